"""MAE-H fine-tuned on ImageNet-1K by the published recipe: 50 epochs, batch 1024.

    python main.py --config=configs/finetune/mae_h_imagenet.py --workdir=runs/mae_h_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_h`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 13 h 9 min on 64 V100.
Published by the MAE repository, top-1: 86.9 (the public file 86.928).
Differs: bfloat16 in place of float16, the warm-up reaches its peak one step earlier, the class token and its
position are one parameter. Unknown: seeds.
"""

from configs import tasks


def get_config():
    return tasks.mae_imagenet("H", "checkpoints/mae_h", epochs=50, blr=0.001, layer_decay=0.75, drop_path=0.3)
