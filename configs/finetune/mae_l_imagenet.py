"""MAE-L fine-tuned on ImageNet-1K by the published recipe: 50 epochs, batch 1024.

    python main.py --config=configs/finetune/mae_l_imagenet.py --workdir=runs/mae_l_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_l`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 8 h 52 min on 32 V100.
Published by the MAE repository, top-1: 85.9 (85.87 +- 0.07; the public file 85.952).
Differs: bfloat16 in place of float16, the warm-up reaches its peak one step earlier, the class token and its
position are one parameter. Unknown: seeds.
"""

from configs import tasks


def get_config():
    return tasks.mae_imagenet("L", "checkpoints/mae_l", epochs=50, blr=0.001, layer_decay=0.75, drop_path=0.2)
