"""iBOT-S transferred to Oxford Flowers: everything fine-tuned, 1000 epochs, batch 768, 224 pixels.

    python main.py --config=configs/finetune/ibot_s_oxford_flowers102.py --workdir=runs/ibot_s_oxford_flowers102

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_s`. Data: TFDS's `oxford_flowers102`, prepared with
file_format="array_record".
Published hardware: 8 GPUs with 96 pictures each.
Published: no number in what was read.
Differs: the rate is divided by 512 there and by 256 here, so base_lr is half; no repeated augmentation (x3 there); a cosine to 0.
"""

from configs import tasks


def get_config():
    return tasks.transfer("oxford_flowers102", 102, epochs=1000, blr=3.75e-06, split="train+validation")
