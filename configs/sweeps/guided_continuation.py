"""What the sources lack, in miniature: one long pretraining with random masks, continued in eight ways, and what each is worth downstream.

python -m maskvit data scenes --data_dir data/guided_continuation --num_train 3000 --num_val 1000
python -m maskvit sweep --config configs/sweeps/guided_continuation.py --seeds 3 --out runs/guided_continuation \
    --controls full_random

Every continuation has 1/16 of the pretraining's epochs on the tail of its schedule, as the published 100 after 1,600; `none` is the
pretraining itself and `random` the control of equal compute. Each is then fine-tuned to the classes of all, 10 % and 1 % of the labels;
`none`, `random` and `high` also to segmentation and depth. At the end of a continuation stand k-NN, and the loss of held-out scenes at
random masks that are the same for all.
"""

from configs import common, tasks

EPOCHS = 32.0
DATA = dict(source="tfds", name="scenes", data_dir="data/guided_continuation")
ENCODER = dict(width=96, depth=4, heads=3)
GUIDANCE = dict(name="self_attention", query="global")
CLASSES = dict(name="classification", num_classes=12, smoothing=0.1)


def get_config():
    """The pretraining with random masks: rgb, depth and semantic maps, to the end of its schedule."""
    config = common.scenes()
    with config.unlocked(), config.ignore_type():
        config.objective.encoder = ENCODER
        config.objective.decoder = dict(width=48, depth=1, heads=2)
        config.data.train = dict(DATA, split="train")
        config.evaluators = dict(knn=dict(type="knn", every="100 percent", crop=1.0, ks=(20,), batch_size=250))
        config.evaluators.held_out = dict(type="masked_loss", every="100 percent", batch_size=250)
    config.total = f"{EPOCHS:g} epochs"
    config.global_batch = config.micro_batch = 64
    config.optimizer.base_lr = 4e-3
    config.schedule = dict(total_epochs=EPOCHS, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    config.picture_every = "0 steps"
    config.checkpoint = dict(every="100 percent", keep=1)
    return config


def continued():
    return common.on_the_tail(get_config(), EPOCHS)


def full():
    return tasks.scenes_task(CLASSES, {}, "classification", 4, ENCODER, DATA)


def ten_percent():
    return tasks.scenes_task(CLASSES, {}, "classification", 20, ENCODER, DATA, share=0.1)


def one_percent():
    # 30 pictures are less than a batch of 64.
    config = tasks.scenes_task(CLASSES, {}, "classification", 60, ENCODER, DATA, share=0.01)
    config.global_batch = 20
    return config


def segmentation():
    return tasks.scenes_task(dict(name="segmentation", target="semseg"), tasks.SCENES_HEAD, "segmentation", 2, ENCODER, DATA)


def depth():
    return tasks.scenes_task(dict(name="regression", target="depth", loss="l1"), tasks.SCENES_HEAD, "depth", 2, ENCODER, DATA)


def get_sweep():
    stages = dict.fromkeys(("full", "ten_percent", "one_percent"), common.CONTINUATIONS)
    return common.continuations(EPOCHS, GUIDANCE, 4e-3, stages | dict.fromkeys(("segmentation", "depth"), ("random", "high")))
