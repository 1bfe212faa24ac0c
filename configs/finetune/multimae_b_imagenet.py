"""MultiMAE-B fine-tuned on ImageNet-1K by the published recipe: rgb alone, 100 epochs, batch 1024.

    python main.py --config=configs/finetune/multimae_b_imagenet.py --workdir=runs/multimae_b_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`. Data: `python -m maskvit data imagenet --root
... --data_dir data`.
Published hardware: 8 GPUs with 128 pictures each.
Published by the MultiMAE repository, top-1: 83.3; 83.5 after 100 epochs more with attention-guided masks (the continuation's
project page).
Differs: bfloat16 in place of float16. Unknown: seeds, time.
"""

from configs import tasks


def get_config():
    return tasks.multimae_imagenet("checkpoints/multimae_b")
