"""The continuation of `guided_continuation.py` on real pictures: one long MAE pretraining on Fashion-MNIST, continued in seven ways.

python -m maskvit data fashion_mnist --root DIR --data_dir data
python -m maskvit sweep --config configs/sweeps/guided_fashion_mnist.py --seeds 3 --out runs/guided_fashion_mnist --controls full_random

10,000 of the 60,000 training pictures, to fit some hours on two cores; fine-tuning has 10 % and 1 % of these with their labels, and all of
them after three of the continuations.
Figures are of the 10,000 test pictures, at the last step.
"""

from configs import common
from configs.sweeps import fashion_mnist

EPOCHS, EXAMPLES, BASE_LR = 32.0, 10_000, 1e-3
DATA = fashion_mnist.DATA


def get_config():
    """The pretraining with random masks, to the end of its schedule."""
    config = fashion_mnist.get_config()
    with config.unlocked():
        config.data.train.examples = EXAMPLES
        config.evaluators.knn.train.examples = EXAMPLES
        config.evaluators.held_out = dict(
            type="masked_loss", every="100 percent", batch_size=500, crop=1.0, data_from=dict(DATA, split="test", examples=2_000)
        )
        config.evaluators.knn.update(ks=(20,), baselines=False)
    config.total = f"{EPOCHS:g} epochs"
    config.schedule = dict(total_epochs=EPOCHS, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    return config


def continued():
    return common.on_the_tail(get_config(), EPOCHS)


def full():
    return fashion_mnist.classifier(6, 1e-3, examples=EXAMPLES)


def ten_percent():
    return fashion_mnist.classifier(15, 1e-3, examples=EXAMPLES // 10)


def one_percent():
    config = fashion_mnist.classifier(60, 1e-3, examples=EXAMPLES // 100)
    config.global_batch = 50  # of 100 pictures
    return config


def get_sweep():
    stages = dict.fromkeys(("ten_percent", "one_percent"), common.CONTINUATIONS) | dict(full=("random", "high", "low"))
    return common.continuations(EPOCHS, dict(name="self_attention", query="global"), BASE_LR, stages)
