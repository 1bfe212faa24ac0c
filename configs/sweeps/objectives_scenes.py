"""Smoke experiments: one small model per objective on the depth of rendered scenes, about four minutes each on one CPU core.

python -m maskvit data scenes --data_dir data/objectives_scenes --num_train 3000 --num_val 2000
python -m maskvit sweep --config configs/sweeps/objectives_scenes.py --seeds 3 --out runs/objectives_scenes --baseline untrained

The one input is depth: in so few steps only depth, where shape is in the open, lets k-NN rise above that of `untrained`, the
network before the first step.
"""

from configs import common

ENCODER = dict(width=64, depth=3, heads=4)


def get_config():
    config = common.scenes()
    config.total = "500 steps"
    config.global_batch = 192
    config.micro_batch = 192
    with config.unlocked():
        config.modalities = dict(depth=config.modalities.depth)
        config.objective = autoencoder("mae", depth=2)
    config.optimizer.base_lr = 3e-3
    config.optimizer.no_decay = (".*bias", r".*norm\w*/scale")
    config.schedule = dict(total_epochs=34.0, start_epochs=0.0, warmup_epochs=3.0, min_lr=0.0)
    config.data.train.data_dir = "data/objectives_scenes"
    config.picture_every = "0 steps"
    config.log_every = 50
    config.checkpoint = dict(every="100 steps", keep=1)
    config.evaluators = dict(knn=dict(type="knn", every="100 steps", crop=1.0, ks=(20,)))
    return config


def autoencoder(name: str, depth: int, **objective) -> dict:
    """The objective block of MAE or CrossMAE over depth."""
    decoder = dict(width=32, depth=depth, heads=2)
    return dict(name=name, inputs=("depth",), outputs=("depth",), mask_ratio=0.75, encoder=ENCODER, decoder=decoder, **objective)


def get_sweep():
    """Every row sets its whole objective."""
    return {
        "mae": {},
        "untrained": {"total": "0 steps"},
        "crossmae": {"objective": autoencoder("crossmae", depth=3)},
        # A third of the hidden tokens rebuilt: cheaper, but so few then teach less.
        "crossmae_quarter": {"objective": autoencoder("crossmae", depth=3, kept_mask_ratio=0.25)},
    }
