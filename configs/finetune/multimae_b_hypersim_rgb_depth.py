"""MultiMAE-B fine-tuned on Hypersim from rgb and depth: ConvNeXt head, 25 epochs, batch 16, 512 pixels.

    python main.py --config=configs/finetune/multimae_b_hypersim_rgb_depth.py --workdir=runs/multimae_b_hypersim_rgb_depth

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data hypersim --root
... --data_dir data`.
Published hardware: 4 GPUs with 4 pictures each, float32.
Published mIoU: 47.6.
Unknown: sizes of the splits used; how many epochs of the schedule are warm-up beyond one.
"""

from configs import tasks


def get_config():
    return tasks.multimae_segmentation("hypersim", 40, size=512, epochs=25, batch=16, every="1 epochs", inputs=("rgb", "depth"))
