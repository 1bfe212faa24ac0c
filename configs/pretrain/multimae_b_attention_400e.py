"""MultiMAE-B from scratch, 400 epochs, from random to attention-guided masking: easy to hard.

    python main.py --config=configs/pretrain/multimae_b_attention_400e.py --workdir=runs/attention_400e

An untrained network's attention says nothing, so the first 40 epochs (the warm-up) mask at random; from there the share of
hidden tokens that attention chooses grows linearly, from none to all at epoch 200. Guidance is read off a teacher (a moving
average of the parameters), whose ranking changes slowly. Cost: 67.0 GFLOP per image for the step and 104.1 for the
guidance pass. Nobody has published a figure for this run.
"""

from configs import common


def get_config():
    config = common.attention_guided(common.multimae_b())
    config.total = "400 epochs"
    config.schedule.total_epochs = 400.0
    config.objective.guidance = dict(name="teacher_attention", query="global", momentum=0.999)
    config.objective.guided_share = dict(share=(0.0, 1.0), start="40 epochs", ramp="160 epochs")
    return config
