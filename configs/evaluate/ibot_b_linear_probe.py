"""iBOT-B: linear probe of the teacher on ImageNet-1K by SGD, 100 epochs.

    python main.py --config=configs/evaluate/ibot_b_linear_probe.py --workdir=runs/ibot_b_linear_probe

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_b`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 8 GPUs with 128 pictures each, 2 with 1,024 (AttMask).
Published top-1: 78.7 (linear probing in the efficient-probing repository).
Unknown: the rate behind the published number, which is swept.
"""

from configs import tasks


def get_config():
    return tasks.sgd_probe("B", "checkpoints/ibot_b", source="both", blr=0.001, batch=1024)
