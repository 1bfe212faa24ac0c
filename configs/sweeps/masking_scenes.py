"""Smoke experiments: one small model per way of masking, on rendered scenes, a minute each on two CPU cores.

python -m maskvit data scenes --data_dir data/masking_scenes --num_train 3000 --num_val 500
python -m maskvit sweep --config configs/sweeps/masking_scenes.py --seeds 3 --out runs/masking_scenes \
    --baseline random --controls low,random_map
python -m maskvit report compare runs/masking_scenes --baseline random --out runs/masking_scenes/compare.html
python -m maskvit report masks --config configs/sweeps/masking_scenes.py --checkpoint runs/masking_scenes/random/seed_0 \
    --split val --out runs/masking_scenes/masks.html

Inputs are depth and rgb, and k-NN reads the depth tokens: in so few steps only depth, where shape is in the open, lets the
features rise above those of an untrained model. The semantic map is an output alone.
"""

from configs import common

ATTENTION = dict(name="self_attention", query="global")


def get_config():
    config = common.scenes()
    config.total = "300 steps"
    config.global_batch = 48
    config.micro_batch = 48
    with config.unlocked():
        config.objective.inputs = ("depth", "rgb")
        config.objective.outputs = ("depth", "rgb", "semseg")
        config.objective.encoder = dict(width=64, depth=3, heads=4)
        config.objective.decoder = dict(width=32, depth=1, heads=2)
        config.objective.loss_weight = dict()
    config.optimizer.base_lr = 2e-2
    # Longer than the run: so short a run learns more at a rate that has not yet fallen to nothing.
    config.schedule = dict(total_epochs=8.0, start_epochs=0.0, warmup_epochs=0.5, min_lr=0.0)
    config.data.train.data_dir = "data/masking_scenes"
    config.picture_every = "0 steps"
    config.log_every = 20
    config.checkpoint = dict(every="300 steps", keep=1)
    config.evaluators = dict(knn=dict(type="knn", every="100 steps", crop=1.0, ks=(20,), limit_train=2000, limit_test=500))
    return config


def get_sweep():
    """Every row sets its whole strategy: scores, guidance, budget, loss weight."""

    def guided(scores: dict, guidance: dict = ATTENTION) -> dict:
        return {"objective.scores": scores, "objective.guidance": guidance}

    return {
        "random": {},
        "untrained": {"total": "0 steps"},
        "high": guided(dict(name="attention_high")),
        "low": guided(dict(name="attention_low")),
        # A control that hides at random by way of a map: what sets it apart from `random` is chance, and `low` must differ by more.
        "random_map": guided(dict(name="attention_high"), dict(name="random_map")),
        "hint": guided(dict(name="attention_hint")),
        "stochastic": guided(dict(name="attention_stochastic", alpha=0.5)),
        "head_ensemble": guided(dict(name="attention_high"), dict(ATTENTION, heads="random")),
        "attg_weighted": {"objective.guidance": ATTENTION, "objective.loss_weight": dict(tau=0.75)},
        "adaptive_budget": {"objective.budget": dict(name="adaptive_dirichlet")},
        "color": {"objective.scores": dict(name="color")},
        # Cheap guidance, refreshed more often than by default: a record is seen five times in such a run.
        "predicted": guided(dict(name="attention_high"), dict(name="predicted_attention", every=8)),
        "reused": guided(dict(name="attention_high"), dict(name="reused_attention", every=4)),
    }
