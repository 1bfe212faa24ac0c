"""MAE-B: linear probe of the class token on ImageNet-1K, 90 epochs, batch 16384, LARS.

    python main.py --config=configs/evaluate/mae_b_linear_probe.py --workdir=runs/mae_b_linear_probe

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_b`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 32 V100 (B: 2 h 20 min).
Published by the MAE repository, top-1: 67.8 (68.0 in the paper).
Differs: batch normalization sees a device's part of the batch, there 512 pictures.
"""

from configs import tasks


def get_config():
    return tasks.mae_linear_probe("B", "checkpoints/mae_b", epochs=90)
