"""CrossMAE-H from scratch, 800 epochs, batch 4096: 64 of 256 tokens shown, 64 rebuilt by 12 blocks of cross-attention.

    python main.py --config=configs/pretrain/crossmae_h.py --workdir=runs/crossmae_h

Every decoder block reads its own weighted sum of the input and all encoder blocks. As in the reference the learning rate is
1.5e-4 x kept / mask ratio = 1.5e-4 x 0.25 / 0.75; runs that are to be compared need the same factor (`config.optimizer.base_lr`).
Cost: 267.4 GFLOP per image and step (MAE-H: 291.4); patches of 14 pixels. The authors trained on 4 cards of 1,024 images each,
or on one by accumulation. Published (README of the CrossMAE repository), ImageNet-1K top-1:
fine-tuned 86.256 (MAE-H 85.9 in the same table). Unknown: the settings of fine-tuning; kept 0.25 is what the released file is called.
"""

from configs import common


def get_config():
    return common.crossmae("H", kept_mask_ratio=0.25)
