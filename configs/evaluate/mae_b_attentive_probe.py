"""MAE-B: efficient probing with 32 queries on ImageNet-1K, 90 epochs, batch 4096.

    python main.py --config=configs/evaluate/mae_b_attentive_probe.py --workdir=runs/mae_b_attentive_probe

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_b`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: not stated in what was read.
Published by efficient-probing, top-1: 75.46 (k-NN 35.57, linear 67.78).
Unknown: seeds; the best epoch on the validation set is reported there, and here.
"""

from configs import tasks


def get_config():
    return tasks.attentive_probe("B", "checkpoints/mae_b", positions="columns_first")
