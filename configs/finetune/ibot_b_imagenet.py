"""iBOT-B (the teacher) fine-tuned on ImageNet-1K: 100 epochs, batch 1024.

    python main.py --config=configs/finetune/ibot_b_imagenet.py --workdir=runs/ibot_b_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_b`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: not stated in what was read.
Published: not in what was read (evaluation/README.md of the repository gives settings).
Unknown: the rate, which the authors swept; the script's 4e-3 at 1,024 and warm-up 20 are taken. Mixup, CutMix off and erasing 0.25
as in the script.
"""

from configs import tasks


def get_config():
    return tasks.ibot_imagenet("B", "checkpoints/ibot_b", epochs=100, drop_path=0.2, layer_decay=0.65)
