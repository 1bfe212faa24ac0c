"""iBOT-S: linear probe of the teacher on ImageNet-1K by SGD, 100 epochs.

    python main.py --config=configs/evaluate/ibot_s_linear_probe.py --workdir=runs/ibot_s_linear_probe

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_s`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 8 GPUs with 128 pictures each, 2 with 1,024 (AttMask).
Published top-1: no number in what was read.
The class tokens of the last four blocks side by side, as the references do for a ViT-S. The best epoch on the validation set is
reported there, and here.
Unknown: how far a run of ours comes; none was made.
"""

from configs import tasks


def get_config():
    return tasks.sgd_probe("S", "checkpoints/ibot_s", source="global", blr=0.001, batch=1024, layers=(9, 10, 11, 12))
