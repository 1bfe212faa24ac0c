"""iBOT-L fine-tuned on ADE20K with UPerNet: 160,000 steps, batch 16, crops of 512.

    python main.py --config=configs/finetune/ibot_l_ade20k_upernet.py --workdir=runs/ibot_l_ade20k_upernet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_l`. Data: `python -m maskvit data ade20k --root ...
--data_dir data`.
Published hardware: 8 GPUs with 2 pictures each.
Published mIoU by sliding windows at the original size: no number in what was read.
Differs: batch normalization is per device.
"""

from configs import tasks


def get_config():
    return tasks.upernet("L", "checkpoints/ibot_l", rate=2e-05, layer_decay=0.95, drop_path=0.2, positions="learned")
