"""MAE-H from scratch by the published recipe: 1600 epochs, batch 4096, 192 of 256 tokens of 14 pixels hidden, normalized pixels rebuilt.

    python main.py --config=configs/pretrain/mae_h_1600e.py --workdir=runs/mae_h_1600e

Cost: 291.4 GFLOP per image and step, 6.0e20 FLOP in all on ImageNet-1K. The authors give no time for H.
Published by the MAE repository (README, FINETUNE.md), ImageNet-1K top-1:
fine-tuned 86.9 (87.8 at 448 pixels), linear probe 77.2 (76.6 in the paper). Unknown: seeds.
"""

from configs import common


def get_config():
    return common.masked_autoencoder("mae", "H")
