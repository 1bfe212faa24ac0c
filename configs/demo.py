"""The main job in minutes on a CPU: the small MultiMAE that ships with the repository, continued on rendered scenes, then fine-tuned.

    make demo

64 x 64 scenes (rgb, exact depth, exact semantic map), 192 tokens of which 32 are visible, attention-guided masking on a
schedule of its own. `configs/pretrain/scenes.py` is how the shipped checkpoint was pretrained. The tasks see the photo alone and have
the labels of 1,000 scenes.
"""

from configs import common, tasks

DATA = dict(source="tfds", name="scenes", data_dir="runs/demo/data")
LABELED, EPOCHS = 1000, 4


def get_config():
    config = common.scenes()
    config.total = "120 steps"
    config.global_batch = 64
    config.micro_batch = 64
    config.optimizer.base_lr = 1.2e-3
    # 3,000 scenes are 46 steps an epoch: a little more than the 120 steps of this run.
    config.schedule = dict(total_epochs=2.65, start_epochs=0.0, warmup_epochs=0.5, min_lr=0.0)
    config.init_from.path = "runs/demo/imported"
    config.log_every = 10
    config.picture_every = "60 steps"
    config.checkpoint = dict(every="60 steps", keep=2)
    features = dict(features=("mean", "global", "raw_pixels"), strengths=(1e-3, 1e-1), standardize=True, iterations=50)
    config.evaluators = dict(
        knn=dict(type="knn", every="120 steps", crop=1.0, baselines=True),
        probe=dict(type="logistic", every="120 steps", crop=1.0, options=features),
    )
    return common.attention_guided(config)


def task(goal: dict, head: dict, evaluator: str):
    """A model of one task, from the photo alone."""
    encoder = common.scenes().objective.encoder.to_dict()
    return tasks.scenes_task(goal, head, evaluator, EPOCHS, encoder, DATA, examples=LABELED)


def classes():
    return task(dict(name="classification", num_classes=12, smoothing=0.1), {}, "classification")


def segmentation():
    return task(dict(name="segmentation", target="semseg"), tasks.SCENES_HEAD, "segmentation")


def depth():
    return task(dict(name="regression", target="depth", loss="l1"), tasks.SCENES_HEAD, "depth")
