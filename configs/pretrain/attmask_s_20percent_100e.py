"""AttMask-High on iBOT, ViT-S/16, 100 epochs of a fifth of ImageNet-1K: the first 260 images of each class in file order.

    python main.py --config=configs/pretrain/attmask_s_20percent_100e.py --workdir=runs/attmask_s_20percent

Published (slides of the AttMask paper, 4 GPUs of 60 images), k-NN / linear on ImageNet-1K, all with 10 to 50 % hidden:

    blocks 46.7 / 56.4, random 47.8 / 56.7, Low 44.0 / 53.4, Hint 49.5 / 57.5, High 49.7 / 57.9

Hint and Low: --config.objective.scores.name=attention_hint (attention_low). Other shares of the data (High 17.5 k-NN at 5 %, 33.8
at 10 %): data.train.per_class=65, 130. The k-NN evaluator classifies with the same fifth of the training images; whether the
published figures do is not known. Cost: 127 GFLOP per image and step, 3.3e18 FLOP in all. Nobody has run this configuration to its
end with this code.
"""

from configs import common


def get_config():
    config = common.attmask_s()
    config.objective.teacher_momentum = 0.99
    config.data.augment.views.local_crops = 6
    with config.unlocked():
        config.data.train.per_class = 260
    return config
