"""How the demo's checkpoint was made: a small MultiMAE from scratch on 12,000 rendered scenes, random masking.

python -m maskvit data scenes --data_dir data/scenes --num_train 12000 --num_val 1000
python main.py --config=configs/pretrain/scenes.py --workdir=runs/scenes
python convert_torch_checkpoint.py --src runs/scenes --dst assets/multimae_scenes.pth --to multimae
"""

from configs import common


def get_config():
    config = common.scenes()
    config.total = "1200 steps"
    config.global_batch = 128
    config.micro_batch = 128
    config.optimizer.base_lr = 2e-3
    config.schedule = dict(total_epochs=13.0, start_epochs=0.0, warmup_epochs=0.6, min_lr=0.0)
    config.data.train.data_dir = "data/scenes"
    config.log_every = 20
    config.picture_every = "400 steps"
    config.checkpoint = dict(every="400 steps", keep=2)
    config.evaluators = dict(knn=dict(type="knn", every="600 steps", crop=1.0, baselines=True))
    return config
