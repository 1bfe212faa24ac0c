"""AttG: MAE-B whose loss weighs a patch exp(g / 0.75), g from stored TokenCut maps; the same at the size of B. 800 epochs at batch 512.

    python -m maskvit maps --config configs/guidance/tokencut_imagenet.py
    python main.py --config=configs/pretrain/attg_b_tokencut.py --workdir=runs/attg_b_tokencut

Masking stays random: only the loss is weighted, from 1 on the background to 3.79 on the object. One A100 of 80 GB in the paper.
Published (AttG, 2024; MAE's figure of the same table in brackets):
nothing: its tables are of ViT-L (see attg_l_tokencut.py).
Unknown: the value of gamma (1 here); whether weights enter the mean's denominator (not here); start and end of the temperature's
schedule (constant here: `loss_weight.tau=(0.8, 0.7)` would be one); which TokenCut output is the map; and the augmentation, of
which the paper says two things: random crops with the maps cropped along here, as in its table.
"""

from configs import common


def get_config():
    return common.attg("B")
