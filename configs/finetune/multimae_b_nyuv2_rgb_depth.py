"""MultiMAE-B fine-tuned on NYUv2's 40 classes from rgb and depth: ConvNeXt head, 200 epochs, batch 8, 640 pixels.

    python main.py --config=configs/finetune/multimae_b_nyuv2_rgb_depth.py --workdir=runs/multimae_b_nyuv2_rgb_depth

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data nyuv2 --root
... --data_dir data`.
Published hardware: 4 GPUs with 2 pictures each.
Published mIoU (padded squares at 640, the best evaluation on the test set): 56.0.
Unknown: the valid mask of the reference's depth, which its preparation does not write.
"""

from configs import tasks


def get_config():
    return tasks.multimae_segmentation("nyuv2", 40, size=640, epochs=200, batch=8, every="20 epochs", inputs=("rgb", "depth"), test="test")
