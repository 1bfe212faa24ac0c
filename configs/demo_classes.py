"""The classes of 300 labeled scenes, from the demo's checkpoints: a small fine-tuning to try `python -m maskvit worth` on.

    make demo
    python -m maskvit worth --config configs/demo_classes.py --imported runs/demo/imported --continued runs/demo/run \
        --seeds 2 --out runs/worth

A tenth of the demo's 3,000 training scenes with their labels, 45 steps of 32, evaluated on its 600 held-out scenes. Published: nothing.
"""

from configs import tasks

DATA = dict(source="tfds", name="scenes", data_dir="runs/demo/data")


def get_config():
    goal = dict(name="classification", num_classes=12, smoothing=0.1)
    sizes = dict(width=128, depth=4, heads=2)
    config = tasks.scenes_task(goal, {}, "classification", 5, sizes, DATA, share=0.1)
    tasks.run_for(config, 5, 1, 32, 4e-3)
    config.log_every = 5
    with config.unlocked():
        config.evaluators.classification.every = "1 epochs"
        config.best = dict(figure="classification/top1", mode="max")
    return config
