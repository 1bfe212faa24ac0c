"""DINO, ViT-S/16, 100 epochs of ImageNet-1K: self-distillation between two large and eight small views.

    python main.py --config=configs/pretrain/dino_s_100e.py --workdir=runs/dino_s_100e

Published (README of facebookresearch/dino): k-NN 69.3, linear 74.0 on ImageNet-1K for the plain 100 epochs, with 64 images per
GPU. Its number of GPUs is taken as one node of 8 here, which the learning rate follows. Cost: 114 GFLOP per image and
step, 1.5e19 FLOP in all. Nobody has run this configuration to its end with this code.

The boosted 300 epochs (73.3 / 76.0): objective.teacher_temperature=(0.04, 0.07), objective.temperature_warmup="30 epochs",
objective.projection.fixed_scale=False; total, schedule.total_epochs and objective.momentum_over of 300 epochs.
"""

from configs import common


def get_config():
    config = common.distillation_s("dino", epochs=100, global_batch=512)
    config.objective.projection.num_prototypes = 65536
    config.objective.projection.fixed_scale = True
    config.objective.teacher_temperature = (0.04, 0.04)
    config.objective.temperature_warmup = "0 epochs"
    config.data.augment.scale = (0.4, 1.0)
    config.data.augment.views.local_crops = 8
    config.data.augment.views.local_scale = (0.05, 0.4)
    return config
