"""iBOT-S transferred to Oxford-IIIT Pets: everything fine-tuned, 1000 epochs, batch 768, 224 pixels.

    python main.py --config=configs/finetune/ibot_s_oxford_iiit_pet.py --workdir=runs/ibot_s_oxford_iiit_pet

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/ibot_s`. Data: TFDS's `oxford_iiit_pet`, prepared with
file_format="array_record".
Published hardware: 8 GPUs with 96 pictures each.
Published: no number in what was read.
Differs: the rate is divided by 512 there and by 256 here, so base_lr is half; no repeated augmentation (x3 there); a cosine to 0.
No source has a recipe for Pets: it is that of Flowers.
"""

from configs import tasks


def get_config():
    return tasks.transfer("oxford_iiit_pet", 37, epochs=1000, blr=3.75e-06, split="train")
