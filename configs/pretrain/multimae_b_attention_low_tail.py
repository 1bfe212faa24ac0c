"""As multimae_b_attention_tail.py, hiding what the model attends to least.

    python main.py --config=configs/pretrain/multimae_b_attention_low_tail.py --workdir=runs/attention_low_tail

Published (fine-tuned, ViT-B): ImageNet-1K 83.3, ADE20K 46.78, NYUv2 51.63.
"""

from configs import common


def get_config():
    return common.attention_guided(common.continue_multimae_b(), scores="attention_low")
