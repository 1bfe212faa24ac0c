"""CrossMAE-L from scratch, 800 epochs, batch 4096: 49 of 196 tokens shown, 147 rebuilt by 12 blocks of cross-attention.

    python main.py --config=configs/pretrain/crossmae_l.py --workdir=runs/crossmae_l

Every decoder block reads its own weighted sum of the input and all encoder blocks. As in the reference the learning rate is
1.5e-4 x kept / mask ratio = 1.5e-4 x 0.75 / 0.75; runs that are to be compared need the same factor (`config.optimizer.base_lr`).
Cost: 124.8 GFLOP per image and step (MAE-L: 124.5). The authors trained on 4 cards of 1,024 images each,
or on one by accumulation. Published (README of the CrossMAE repository), ImageNet-1K top-1:
fine-tuned 85.432. Unknown: the settings of fine-tuning.
"""

from configs import common


def get_config():
    return common.crossmae("L", kept_mask_ratio=0.75)
