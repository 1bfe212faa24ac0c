"""MAE-L from scratch by the published recipe: 1600 epochs, batch 4096, 147 of 196 tokens hidden, normalized pixels rebuilt.

    python main.py --config=configs/pretrain/mae_l_1600e.py --workdir=runs/mae_l_1600e

Cost: 124.5 GFLOP per image and step, 2.6e20 FLOP in all on ImageNet-1K. The authors took about 42 h on 64 V100 for 800 epochs.
Published by the MAE repository (README, FINETUNE.md), ImageNet-1K top-1:
fine-tuned 85.9 (four trials: 85.87 +- 0.07; after 800 epochs 85.5), linear probe 76.0 (75.8 in the paper). Unknown: seeds.
"""

from configs import common


def get_config():
    return common.masked_autoencoder("mae", "L")
