"""The main job in minutes on a CPU: the small MultiMAE that ships with the repository, continued on rendered scenes.

    make demo

64 x 64 scenes (rgb, exact depth, exact semantic map), 192 tokens of which 32 are visible, attention-guided masking on a
schedule of its own. `configs/pretrain/scenes.py` is how the shipped checkpoint was pretrained.
"""

from configs import common


def get_config():
    config = common.scenes()
    config.total = "240 steps"
    config.global_batch = 64
    config.micro_batch = 64
    config.optimizer.base_lr = 1.2e-3
    # 3,000 scenes are 46 steps an epoch: a little more than the 240 steps of this run.
    config.schedule = dict(total_epochs=5.3, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    config.init_from.path = "runs/demo/imported"
    config.log_every = 10
    config.picture_every = "80 steps"
    config.checkpoint = dict(every="80 steps", keep=2)
    config.evaluators = dict(knn=dict(type="knn", every="240 steps", crop=1.0, baselines=True))
    return common.attention_guided(config)
