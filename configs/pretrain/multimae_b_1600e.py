"""MultiMAE-B from scratch by the published recipe: 1600 epochs, batch 2048, random masking.

    python main.py --config=configs/pretrain/multimae_b_1600e.py --workdir=runs/multimae_b_1600e

Cost: 67.0 GFLOP per image and step, 1.4e20 FLOP in all on ImageNet-1K. Published (fine-tuned, ViT-B): ImageNet-1K 83.3,
ADE20K 46.2, NYUv2 52.0.
"""

from configs import common


def get_config():
    return common.multimae_b()
