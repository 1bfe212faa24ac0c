"""What the sources lack, in miniature: one long pretraining with random masks, continued in eight ways, and what each is worth downstream.

python -m maskvit data scenes --data_dir data/guided_continuation --num_train 6000 --num_val 1000
python -m maskvit sweep --config configs/sweeps/guided_continuation.py --seeds 3 --out runs/guided_continuation \
    --baseline full_none --controls full_random

Every continuation has 1/16 of the pretraining's epochs on the tail of its schedule, as the published 100 after 1,600; `none` is the
pretraining itself and `random` the control of equal compute. Each is then fine-tuned to the classes of all, 10 % and 1 % of the labels, and
with all of them to segmentation and depth. The evaluation at the end of a continuation is k-NN.
"""

from configs import common, tasks

EPOCHS = 32.0
DATA = dict(source="tfds", name="scenes", data_dir="data/guided_continuation")
ENCODER = dict(width=96, depth=4, heads=3)
GUIDANCE = dict(name="self_attention", query="global")


def get_config():
    """The pretraining with random masks: rgb, depth and semantic maps, the first fifteen sixteenths of its schedule and one more."""
    config = common.scenes()
    with config.unlocked(), config.ignore_type():
        config.objective.encoder = ENCODER
        config.objective.decoder = dict(width=48, depth=1, heads=2)
        config.data.train = dict(DATA, split="train")
        config.evaluators = dict(knn=dict(type="knn", every="100 percent", crop=1.0, ks=(20,), batch_size=250))
    config.total = f"{EPOCHS:g} epochs"
    config.global_batch = config.micro_batch = 64
    config.optimizer.base_lr = 4e-3
    config.schedule = dict(total_epochs=EPOCHS, start_epochs=0.0, warmup_epochs=1.0, min_lr=0.0)
    config.picture_every = "0 steps"
    config.checkpoint = dict(every="100 percent", keep=1)
    return config


def continued():
    """One sixteenth more, on the tail of the schedule."""
    config = get_config()
    config.total = f"{EPOCHS / 16:g} epochs"
    config.schedule.start_epochs = EPOCHS * 15 / 16
    return config


def fine_tuned(task: dict, head: dict, figure: str, epochs: int, **subset):
    """From rgb alone."""
    config = tasks.task("B", task, "", {}, dict(crop="random_resized", scale=(0.5, 1.0), flip=0.5), drop_path=0.1, pool="all")
    modalities = common.scenes().modalities
    with config.unlocked(), config.ignore_type():
        config.image_size = (64, 64)
        config.modalities = dict(rgb=modalities.rgb)
        if task.get("target") == "semseg":
            config.modalities.semseg = dict(modalities.semseg.to_dict(), stride=1, missing=-1)
        if task.get("target") == "depth":
            # Counts of 1/512 m; mean and deviation are the scenes'.
            depth = dict(modalities.depth.to_dict(), standardize=False, scale=1 / 512, mean=(8.0,), std=(5.4,))
            config.modalities.depth = depth
        config.objective.update(encoder=ENCODER, head=head, compute_dtype="float32")
        config.data.train = dict(DATA, split="train", **subset)
        config.data.workers = 0
        config.optimizer.layer_decay = 0.75
        kind = figure.partition("/")[0]
        config.evaluators = {kind: dict(type=kind, every="100 percent", crop=1.0, batch_size=250, data_from=dict(DATA, split="val"))}
    config.checkpoint = dict(every="100 percent", keep=1)
    return tasks.run_for(config, epochs, max(1, epochs // 10), 64, 4e-3)


def full():
    return fine_tuned(dict(name="classification", num_classes=12, smoothing=0.1), {}, "classification/top1", 4)


def ten_percent():
    return fine_tuned(dict(name="classification", num_classes=12, smoothing=0.1), {}, "classification/top1", 20, share=0.1)


def one_percent():
    # 60 pictures are less than a batch of 64: two and a half epochs of 24 each.
    config = fine_tuned(dict(name="classification", num_classes=12, smoothing=0.1), {}, "classification/top1", 60, share=0.01)
    config.global_batch = 20
    return config


def segmentation():
    return fine_tuned(
        dict(name="segmentation", target="semseg"),
        dict(name="convnext", width=512, preds_per_patch=16, depth=2),
        "segmentation/mean_iou",
        4,
    )


def depth():
    return fine_tuned(
        dict(name="regression", target="depth", loss="l1"),
        dict(name="convnext", width=512, preds_per_patch=16, depth=2),
        "depth/delta_1",
        4,
    )


def get_sweep():
    guided = {"objective.guidance": GUIDANCE}
    ways = {
        "random": {},
        "high": {**guided, "objective.scores": dict(name="attention_high")},
        "low": {**guided, "objective.scores": dict(name="attention_low")},
        "stochastic": {**guided, "objective.scores": dict(name="attention_stochastic", alpha=0.5)},
        "random_heads": {"objective.guidance": dict(GUIDANCE, heads="random"), "objective.scores": dict(name="attention_high")},
        "high_ten_times": {**guided, "objective.scores": dict(name="attention_high"), "optimizer.base_lr": 4e-2},
        "high_restarted": {
            **guided, "objective.scores": dict(name="attention_high"), "schedule.start_epochs": 0.0, "schedule.total_epochs": EPOCHS / 16,
            "schedule.warmup_epochs": EPOCHS / 80,
        },
    }  # fmt: skip
    cells = {"none": {}, **{name: dict(changes, config="continued", after="none") for name, changes in ways.items()}}
    for stage in ("full", "ten_percent", "one_percent", "segmentation", "depth"):
        cells |= {f"{stage}_{name}": dict(config=stage, after=name) for name in ("none", *ways)}
        cells[f"{stage}_from_random"] = dict(config=stage)
    return cells
