"""Your own photos in class folders, from the public MultiMAE-B: a starting point for some hundreds to thousands of them.

    python main.py --config=configs/finetune/own_classes.py --workdir=runs/photos --config.data.train.name=photos \
        --config.objective.task.num_classes=12

Weights: `python convert_torch_checkpoint.py --src FILE --dst checkpoints/multimae_b`; any other encoder by config.init_from.path and
config.objective (encoder, positions, pool). Data: `python -m maskvit data folder --root DIR --data_dir data --name photos --modalities rgb
--val_fraction 0.2`. 60 epochs at batch 32; the best of the evaluations on the held-out photos is kept.
Published: nothing. Unknown: what is best for your photos; the first to vary are the rate and the number of epochs.
"""

from configs import tasks


def get_config():
    augment = dict(tasks.CROPS, scale=(0.3, 1.0))
    goal = dict(name="classification", num_classes=2, smoothing=0.1)
    config = tasks.task("B", goal, "checkpoints/multimae_b", dict(name="photos"), augment, drop_path=0.1, pool="all")
    with config.unlocked():
        config.optimizer.layer_decay = 0.75
    tasks.run_for(config, 60, 5, 32, tasks.absolute(5e-4, 32))
    return tasks.watch(config, "accuracy/top1", "5 epochs", type="classification", protocol="imagenet_224", batch_size=64)
