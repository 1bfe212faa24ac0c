"""MAE-L: linear probe of the class token on ImageNet-1K, 50 epochs, batch 16384, LARS.

    python main.py --config=configs/evaluate/mae_l_linear_probe.py --workdir=runs/mae_l_linear_probe

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_l`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 32 V100 (B: 2 h 20 min).
Published by the MAE repository, top-1: 76.0 (75.8).
Differs: batch normalization sees a device's part of the batch, there 512 pictures.
"""

from configs import tasks


def get_config():
    return tasks.mae_linear_probe("L", "checkpoints/mae_l", epochs=50)
