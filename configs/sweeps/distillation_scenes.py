"""Smoke experiments of self-distillation: one small model per method on rendered scenes, a minute each on two CPU cores.

python -m maskvit.data.builders scenes --data_dir data/masking_scenes --num_train 3000 --num_val 500
python -m maskvit.sweep --config configs/sweeps/distillation_scenes.py --seeds 3 --out runs/distillation_scenes --baseline ibot

The input is depth, where shape is in the open; colours would need more steps than these. k-NN reads the teacher; that of the
untrained network is a run with total=0. So few steps show that it runs and does not collapse: the loss
falls for 100 steps, then follows its teacher up again, and k-NN stays within chance of the untrained network's (17.6, one run).
"""

from configs import common


def get_config():
    config = common.distillation_s("ibot", epochs=8, global_batch=48)
    scenes = common.scenes()
    config.total = "300 steps"
    config.image_size = (64, 64)
    config.micro_batch = 48
    with config.unlocked():
        config.modalities = dict(depth=scenes.modalities.depth)
        config.objective.inputs = ("depth",)
        config.objective.encoder = dict(width=64, depth=3, heads=4)
        config.objective.projection = dict(hidden=128, bottleneck=64, num_prototypes=256, fixed_scale=True)
        config.objective.scores = dict()
        config.objective.masking = dict()
        config.objective.guidance = dict(name="block_mask", ratio=(0.0, 0.3), ratio_var=(0.0, 0.2))
        config.objective.teacher_momentum = 0.99
        config.objective.teacher_temperature = (0.04, 0.04)
        config.objective.patch_temperature = (0.04, 0.04)
        config.objective.temperature_warmup = "0 epochs"
        config.objective.compute_dtype = "float32"
        config.data.train = dict(source="tfds", name="scenes", data_dir="data/masking_scenes", split="train")
        config.data.augment.scale = (0.4, 1.0)
        config.data.augment.views = dict(local_crops=2, local_size=(32, 32), local_scale=(0.1, 0.4))
    config.data.workers = 0
    config.optimizer.base_lr = 2e-3
    config.schedule = dict(total_epochs=8.0, start_epochs=0.0, warmup_epochs=0.5, min_lr=0.0)
    config.picture_every = "0 steps"
    config.log_every = 20
    config.checkpoint = dict(every="300 steps", keep=1)
    config.evaluators = dict(knn=dict(type="knn", every="100 steps", crop=1.0, ks=(20,), limit_train=2000, limit_test=500))
    return config


def get_sweep():
    """iBOT hides exact blocks; AttMask hides 10 to 50 % of half of the views by its scores; DINO hides nothing."""

    def masked(scores: str) -> dict:
        return {
            "objective.guidance": dict(),
            "objective.scores": dict(name=scores),
            "objective.masking": dict(ratio=0.3, ratio_var=0.2, probability=0.5, per="step"),
        }

    of_masks = ("guidance", "scores", "masking", "patch_temperature")
    dino = {key: value for key, value in get_config().objective.to_dict().items() if key not in of_masks}
    return {
        "ibot": {},
        "dino": {"objective": {**dino, "name": "dino"}},
        "attmask_high": masked("attention_high"),
        "attmask_hint": masked("attention_hint"),
        "attmask_low": masked("attention_low"),
        "ibot_random": masked("random"),
    }
