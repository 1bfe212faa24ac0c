"""As multimae_b_attention_tail.py with ten times the learning rate: the tail's own peak is 1 % of the base.

    python main.py --config=configs/pretrain/multimae_b_attention_scaled.py --workdir=runs/attention_scaled

Published (fine-tuned, ViT-B): ImageNet-1K 83.4, ADE20K 46.3, NYUv2 51.32.
"""

from configs import common


def get_config():
    config = common.attention_guided(common.continue_multimae_b())
    config.optimizer.base_lr = 1e-3
    return config
