"""What pretraining is worth on real labeled data: a small MAE on Fashion-MNIST against the same model from random initialization.

python -m maskvit data fashion_mnist --root DIR --data_dir data
python -m maskvit sweep --config configs/sweeps/fashion_mnist.py --out runs/fashion_mnist

Pretraining on 60,000 pictures without labels; then weighted k-NN (and k-NN of raw pixels), a linear and an attentive probe of the frozen
encoder, and fine-tuning with all labels, 10 % and 1 % of them; everything once more from random initialization. Figures are of the 10,000
test pictures, at the last step: nothing is chosen on them.
"""

from configs import common, tasks

DATA = dict(source="tfds", name="fashion_mnist", data_dir="data")
ENCODER = dict(width=64, depth=4, heads=2)


def pictures() -> dict:
    """28 x 28 gray pictures stored as 32 x 32 in three equal channels."""
    return dict(rgb=dict(kind="continuous", channels=3, patch=4, loss="mse", scale=1 / 255, mean=(0.2212,), std=(0.3239,)))


def get_config():
    """The pretraining: 75 % of 64 tokens hidden."""
    config = common.masked_autoencoder("mae", "B")
    with config.unlocked(), config.ignore_type():
        config.image_size = (32, 32)
        config.modalities = pictures()
        config.objective.encoder = ENCODER
        config.objective.decoder = dict(width=48, depth=1, heads=2)
        config.objective.compute_dtype = "float32"
        config.data = dict(
            train=dict(DATA, split="train"), augment=dict(crop="random_resized", scale=(0.5, 1.0), flip=0.5), workers=0, prefetch=2
        )
        config.evaluators = dict(knn=dict(type="knn", every="100 percent", crop=1.0, ks=(1, 5, 20), baselines=True, batch_size=500))
        config.evaluators.knn.test = dict(DATA, split="test")
        config.evaluators.knn.train = dict(DATA, split="train")
    config.total = "10 epochs"
    config.global_batch = config.micro_batch = 256
    config.optimizer.base_lr = 1e-3
    config.schedule = dict(total_epochs=10.0, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    config.picture_every = "0 steps"
    config.log_every = 100
    config.checkpoint = dict(every="100 percent", keep=1)
    return config


def classifier(epochs: int, base_lr: float, **subset):
    """Ten classes from all labels, or some; the length in epochs of that many pictures."""
    augment = dict(crop="random_resized", scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    goal = dict(name="classification", num_classes=10, smoothing=0.1)
    config = tasks.task("B", goal, "", {}, augment, positions="columns_first", drop_path=0.1)
    with config.unlocked(), config.ignore_type():
        config.image_size = (32, 32)
        config.modalities = pictures()
        config.objective.encoder = ENCODER
        config.objective.compute_dtype = "float32"
        config.data.train = dict(DATA, split="train", **subset)
        config.data.workers = 0
        config.optimizer.layer_decay = 0.75
        config.evaluators = dict(
            accuracy=dict(type="classification", every="100 percent", crop=1.0, batch_size=500, data_from=dict(DATA, split="test"))
        )
    config.log_every = 50
    config.checkpoint = dict(every="100 percent", keep=1)
    return tasks.run_for(config, epochs, epochs / 10, 128, base_lr)


def full():
    return classifier(3, 1e-3)


def ten_percent():
    return classifier(12, 1e-3, share=0.1)


def one_percent():
    return classifier(40, 1e-3, share=0.01)


def linear_probe():
    """Batch normalization and a linear layer on the mean of the frozen patch tokens."""
    config = classifier(1, 1e-2)
    with config.unlocked(), config.ignore_type():
        config.objective.head = dict(name="probe", source="mean")
        config.objective.update(drop_path=0.0, final_norm=True)
        config.objective.task.smoothing = 0.0
        config.optimizer.update(frozen=(*tasks.FROZEN, "norm/.*"), weight_decay=0.0)
        del config.optimizer["layer_decay"]
        config.optimizer.no_decay = ()
    return config


def attentive_probe():
    """Efficient probing with eight queries."""
    config = linear_probe()
    config.objective.head = dict(name="attentive", pooling="ep", queries=8)
    return config


def get_sweep():
    stages = ("linear_probe", "attentive_probe", "full", "ten_percent", "one_percent")
    return {
        "pretrained": {},
        "untrained": {"total": "0 steps"},
        **{stage: dict(config=stage, after="pretrained", against=f"{stage}_from_random") for stage in stages},
        **{f"{stage}_from_random": dict(config=stage) for stage in stages},
    }
