"""MultiMAE-B: linear probe of the global token on ImageNet-1K by MAE's code, 90 epochs, batch 16384.

    python main.py --config=configs/evaluate/multimae_b_linear_probe.py --workdir=runs/multimae_b_linear_probe

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data imagenet --root
... --data_dir data`.
Published hardware: not stated.
Published by a maintainer in an issue, top-1: 60.3 (their MAE 66.9).
Unknown: which token was probed.
"""

from configs import tasks


def get_config():
    return tasks.multimae_linear_probe("checkpoints/multimae_b")
