"""CrossMAE-S from scratch, 800 epochs, batch 4096: 49 of 196 tokens shown, 147 rebuilt by 12 blocks of cross-attention.

    python main.py --config=configs/pretrain/crossmae_s.py --workdir=runs/crossmae_s

Every decoder block reads its own weighted sum of the input and all encoder blocks. As in the reference the learning rate is
1.5e-4 x kept / mask ratio = 1.5e-4 x 0.75 / 0.75; runs that are to be compared need the same factor (`config.optimizer.base_lr`).
Cost: 15.0 GFLOP per image and step (10.0 at kept 0.25). The authors trained on 4 cards of 1,024 images each,
or on one by accumulation. Published (README of the CrossMAE repository), ImageNet-1K top-1:
fine-tuned 79.318 (79.462 for a run on one RTX 4090); linear probe 51.5 (an issue comment of the authors; MAE-S 49.7). Unknown: the
kept ratio of the single-card run, of which folder and file names say different things.
"""

from configs import common


def get_config():
    config = common.crossmae("S", kept_mask_ratio=0.75)
    with config.unlocked():
        config.objective.decoder = dict(width=256, heads=8)
    return config
