"""Class, segmentation and depth of rendered scenes: a small pretrained MultiMAE against the same heads on a random encoder.

python -m maskvit data scenes --data_dir data/downstream_scenes --num_train 6000 --num_val 1000
python -m maskvit sweep --config configs/sweeps/downstream_scenes.py --out runs/downstream_scenes

From rgb alone, and from rgb and depth (depth itself from rgb alone). Every run's pictures/ hold what its evaluator shows: the confusion
matrix of a classifier.
"""

from configs import common, tasks

DATA = dict(source="tfds", name="scenes", data_dir="data/downstream_scenes")
ENCODER = dict(width=96, depth=4, heads=3)
CLASSES = dict(name="classification", num_classes=12, smoothing=0.1)
PIXELS = dict(name="segmentation", target="semseg")
BOTH = ("rgb", "depth")


def get_config():
    """The pretraining: rgb, depth and semantic maps, random masks, 10 epochs."""
    config = common.scenes()
    with config.unlocked(), config.ignore_type():
        config.objective.encoder = ENCODER
        config.objective.decoder = dict(width=48, depth=1, heads=2)
        config.data.train = dict(DATA, split="train")
        config.evaluators = dict(knn=dict(type="knn", every="100 percent", crop=1.0, ks=(20,), batch_size=250, baselines=True))
    config.total = "10 epochs"
    config.global_batch = config.micro_batch = 64
    config.optimizer.base_lr = 4e-3
    config.schedule = dict(total_epochs=10.0, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    config.picture_every = "0 steps"
    config.checkpoint = dict(every="100 percent", keep=1)
    return config


def classes_rgb():
    return tasks.scenes_task(CLASSES, {}, "classification", 4, ENCODER, DATA)


def classes_rgb_depth():
    return tasks.scenes_task(CLASSES, {}, "classification", 4, ENCODER, DATA, BOTH)


def segmentation_rgb():
    return tasks.scenes_task(PIXELS, tasks.SCENES_HEAD, "segmentation", 4, ENCODER, DATA)


def segmentation_rgb_depth():
    return tasks.scenes_task(PIXELS, tasks.SCENES_HEAD, "segmentation", 4, ENCODER, DATA, BOTH)


def depth_rgb():
    return tasks.scenes_task(dict(name="regression", target="depth", loss="l1"), tasks.SCENES_HEAD, "depth", 4, ENCODER, DATA)


def get_sweep():
    stages = ("classes_rgb", "classes_rgb_depth", "segmentation_rgb", "segmentation_rgb_depth", "depth_rgb")
    cells = {"pretrained": {}}
    for stage in stages:
        cells |= {stage: dict(config=stage, after="pretrained", against=f"{stage}_from_random"), f"{stage}_from_random": dict(config=stage)}
    return cells
