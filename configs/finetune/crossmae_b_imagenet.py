"""CrossMAE-B fine-tuned on ImageNet-1K: MAE's recipe for B.

    python main.py --config=configs/finetune/crossmae_b_imagenet.py --workdir=runs/crossmae_b_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/crossmae_b`. Data: `python -m maskvit data imagenet --root
... --data_dir data`.
Published hardware: 4 GPUs with 256 pictures each.
Published: see the repository's README; this project has no number it checked.
Unknown: L and H settings.
"""

from configs import tasks


def get_config():
    return tasks.mae_imagenet("B", "checkpoints/crossmae_b", epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1)
