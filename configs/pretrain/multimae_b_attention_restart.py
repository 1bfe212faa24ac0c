"""As multimae_b_attention_tail.py, on a schedule of its own: 100 epochs with 20 of warm-up, from start 0.

    python main.py --config=configs/pretrain/multimae_b_attention_restart.py --workdir=runs/attention_restart

Published (fine-tuned, ViT-B): ImageNet-1K 83.3, ADE20K 46.6, NYUv2 50.27: worse than the tail on dense tasks.
"""

from configs import common


def get_config():
    config = common.attention_guided(common.continue_multimae_b())
    config.schedule = dict(total_epochs=100.0, start_epochs=0.0, warmup_epochs=20.0, min_lr=0.0)
    return config
