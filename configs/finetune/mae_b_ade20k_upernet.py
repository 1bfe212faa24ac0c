"""MAE-B fine-tuned on ADE20K with UPerNet as mmsegmentation does: 160,000 steps, batch 16, crops of 512.

    python main.py --config=configs/finetune/mae_b_ade20k_upernet.py --workdir=runs/mae_b_ade20k_upernet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_b`. Data: `python -m maskvit data ade20k --root ...
--data_dir data`.
Published hardware: 8 GPUs with 2 pictures each.
Published mIoU by sliding windows at the original size: 48.13 (48.1 in the MAE paper).
Differs: batch normalization is per device; layer scale is left out.
"""

from configs import tasks


def get_config():
    return tasks.upernet(
        "B",
        "checkpoints/mae_b",
        rate=1e-4,
        layer_decay=0.65,
        drop_path=0.1,
        positions="columns_first",
        protocol="ade20k_sliding_512_stride_256",
    )
