"""MAE-B fine-tuned on ImageNet-1K by the published recipe: 100 epochs, batch 1024.

    python main.py --config=configs/finetune/mae_b_imagenet.py --workdir=runs/mae_b_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/mae_b`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: 7 h 11 min on 32 V100.
Published by the MAE repository, top-1: 83.6 (four trials 83.57 +- 0.08; the public file evaluates to 83.664).
Differs: bfloat16 in place of float16, the warm-up reaches its peak one step earlier, the class token and its
position are one parameter. Unknown: seeds.
"""

from configs import tasks


def get_config():
    return tasks.mae_imagenet("B", "checkpoints/mae_b", epochs=100, blr=0.0005, layer_decay=0.65, drop_path=0.1)
