"""iBOT-S transferred to CIFAR-100: everything fine-tuned, 1000 epochs, batch 768, 224 pixels.

    python main.py --config=configs/finetune/ibot_s_cifar100.py --workdir=runs/ibot_s_cifar100

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_s`. Data: TFDS's `cifar100`, prepared with
file_format="array_record".
Published hardware: 8 GPUs with 96 pictures each.
Published by AttMask (100 epochs of pretraining), CIFAR-10 and -100: see the sweep of masks in its paper.
Differs: the rate is divided by 512 there and by 256 here, so base_lr is half; no repeated augmentation (x3 there); a cosine to 0.
"""

from configs import tasks


def get_config():
    return tasks.transfer("cifar100", 100, epochs=1000, blr=3.75e-06, split="train")
