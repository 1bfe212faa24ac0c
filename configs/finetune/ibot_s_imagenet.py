"""iBOT-S (the teacher) fine-tuned on ImageNet-1K: 200 epochs, batch 1024.

    python main.py --config=configs/finetune/ibot_s_imagenet.py --workdir=runs/ibot_s_imagenet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_s`. Data: `python -m maskvit data imagenet --root ...
--data_dir data`.
Published hardware: not stated in what was read.
Published: not in what was read (evaluation/README.md of the repository gives settings).
Unknown: the rate, which the authors swept; the script's 4e-3 at 1,024 and warm-up 20 are taken. Mixup, CutMix off and erasing 0.25
as in the script.
"""

from configs import tasks


def get_config():
    return tasks.ibot_imagenet("S", "checkpoints/ibot_s", epochs=200, drop_path=0.1, layer_decay=0.75)
