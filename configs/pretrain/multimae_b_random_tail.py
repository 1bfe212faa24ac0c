"""The baseline of the main job: the same 100 epochs on the tail with MultiMAE's own random masking.

    python main.py --config=configs/pretrain/multimae_b_random_tail.py --workdir=runs/random_tail

Published (fine-tuned, ViT-B): ImageNet-1K 83.3, ADE20K 47.0, NYUv2 51.5.
"""

from configs import common


def get_config():
    return common.continue_multimae_b()
