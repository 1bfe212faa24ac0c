"""The main job: the public MultiMAE-B, continued for 100 epochs with attention-guided masking on the tail of its schedule.

    python convert_torch_checkpoint.py --src multimae-b_98_rgb+-depth-semseg_1600e_multivit-afff3f8c.pth --dst checkpoints/multimae_b
    python main.py --config=configs/pretrain/multimae_b_attention_tail.py --workdir=runs/attention_tail

The schedule's tail is epoch 1500 to 1600 of the original 1600; for a true continuation beyond the public file's 1600
epochs add --config.schedule.total_epochs=1700 --config.schedule.start_epochs=1600. Cost: 67.0 GFLOP per image for the
step and 105.4 GFLOP for the guidance pass. Published for this recipe (fine-tuned, ViT-B): ImageNet-1K 83.5, ADE20K 46.9,
NYUv2 51.6, against 83.3, 47.0, 51.5 without guidance.
"""

from configs import common


def get_config():
    return common.attention_guided(common.continue_multimae_b())
