"""What the shipped downstream experiments share, as plain data: fine-tuning to classes, pixels and maps, and probes of a frozen encoder.

Rates of the references that are absolute are written as `absolute(rate, batch)`, since ours is multiplied by batch / 256; so are floors.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

# Norms, biases and tokens do not decay.
NO_DECAY = (".*bias", r".*norm\w*/scale", "global_tokens")
RGB_LABELS = dict(kind="categorical", patch=16, stride=1, loss="cross_entropy", missing=255)


def absolute(rate: float, global_batch: int) -> float:
    """A learning rate of that value at `global_batch`."""
    return rate * 256 / global_batch


def task(encoder: str, task: dict, init: str, data: dict, augment: dict, **objective) -> ConfigDict:
    """A supervised run of rgb pictures that begins from the weights at `init`; the caller sets lengths and rates."""
    return ConfigDict(
        dict(
            seed=0,
            image_size=(224, 224),
            total="100 epochs",
            global_batch=1024,
            micro_batch=0,
            modalities=dict(rgb=common.modalities().rgb),
            objective=dict(
                name="supervised", inputs=("rgb",), encoder=encoder, task=task, head=dict(), compute_dtype="bfloat16", remat=False,
                **objective,
            ),
            optimizer=dict(name="adamw", base_lr=1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.05, no_decay=NO_DECAY),
            schedule=dict(total_epochs=100.0, start_epochs=0.0, warmup_epochs=5.0, min_lr=0.0),
            data=dict(train=dict(source="tfds", data_dir="data", split="train", **data), augment=augment, workers=8, prefetch=2),
            evaluators=dict(),
            best=config_dict.placeholder(dict),
            init_from=dict(path=init, fresh=(), drop=(), weights="params"),
            log_every=50,
            picture_every="0 steps",
            checkpoint=dict(every="1 epochs", keep=2),
            writers=(),
        )
    )  # fmt: skip


def run_for(config: ConfigDict, epochs: float, warmup: float, global_batch: int, base_lr: float, min_lr: float = 0.0) -> ConfigDict:
    """Set the length of a run, its batch and its rates; `base_lr` is times batch / 256, `min_lr` is absolute."""
    config.total = f"{epochs:g} epochs"
    config.global_batch = global_batch
    config.optimizer.base_lr = base_lr
    config.schedule = dict(config.schedule, total_epochs=float(epochs), warmup_epochs=float(warmup), min_lr=absolute(min_lr, global_batch))
    return config


def watch(config: ConfigDict, figure: str, every: str, mode: str = "max", **evaluator) -> ConfigDict:
    """Evaluate at intervals and keep the best checkpoint; as in the references the set it is chosen on is the one that is reported."""
    name = figure.partition("/")[0]
    with config.unlocked():
        config.evaluators[name] = dict(evaluator, every=every)
        config.best = dict(figure=figure, mode=mode)
    return config


# Classes of pictures

CROPS = dict(crop="random_resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, resize="pil")


def imagenet(encoder: str, init: str, erasing: float, drop_path: float, layer_decay: float, classes: int = 1000, **objective) -> ConfigDict:
    """ImageNet-1K by the recipe that MAE and MultiMAE share: RandAugment, mixup, CutMix, smoothing, layer-wise rates."""
    goal = dict(name="classification", num_classes=classes, smoothing=0.1, mixup=0.8, cutmix=1.0, erasing=erasing)
    augment = dict(CROPS, randaugment="rand-m9-mstd0.5-inc1")
    config = task(encoder, goal, init, dict(name="imagenet"), augment, drop_path=drop_path, **objective)
    with config.unlocked():
        config.optimizer.layer_decay = layer_decay
    return watch(config, "accuracy/top1", "1 epochs", type="classification", protocol="imagenet_224", batch_size=1024)


def mae_imagenet(encoder: str, init: str, epochs: int, blr: float, layer_decay: float, drop_path: float) -> ConfigDict:
    """MAE's fine-tuning; position tables are trained, the mean of the patch tokens is classified."""
    trained = dict(positions="columns_first", train_positions=True, pool="mean")
    config = imagenet(encoder, init, erasing=0.25, drop_path=drop_path, layer_decay=layer_decay, **trained)
    if encoder == "H":
        config.modalities.rgb.patch = 14
    config.optimizer.no_decay = (*NO_DECAY, ".*pos_embed")
    return run_for(config, epochs, 5, 1024, blr, min_lr=1e-6)


def multimae_imagenet(init: str) -> ConfigDict:
    """MultiMAE's fine-tuning; the mean of all tokens, the global one too, is classified."""
    config = imagenet("B", init, erasing=0.0, drop_path=0.1, layer_decay=0.65, pool="all")
    return run_for(config, 100, 5, 1024, 5e-4, min_lr=1e-6)


def low_shot(config: ConfigDict, **subset) -> ConfigDict:
    """The same run on a part of the training data: share=0.01, or examples=10000; drawn class by class by subset_seed 0."""
    with config.unlocked():
        config.data.train.update(subset)
    return config


def transfer(
    name: str, classes: int, epochs: int, blr: float, split: str = "train", test: str = "test", feature: str = "image"
) -> ConfigDict:
    """iBOT's and AttMask's transfer: the class token, everything fine-tuned at a very low rate."""
    config = imagenet("S", "checkpoints/ibot_s", erasing=0.25, drop_path=0.1, layer_decay=1.0, classes=classes, **DISTILLED)
    config.data.train = dict(source="tfds", data_dir="data", name=name, split=split, features=dict(rgb=feature))
    config.evaluators.accuracy.data_from = dict(source="tfds", data_dir="data", name=name, split=test, features=dict(rgb=feature))
    config.init_from.weights = "teacher"
    return run_for(config, epochs, 5, 768, blr)


# Classes of pixels, and maps

DISTILLED = dict(positions="learned", pool="global", final_norm=True)


def dense(
    goal: dict, head: dict, init: str, name: str, size: int, augment: dict, inputs: tuple[str, ...] = ("rgb",), **objective
) -> ConfigDict:
    """A value for every pixel of the target of `goal`, by MultiMAE's optimizer: layer decay 0.75, warm-up of one epoch."""
    config = task("B", goal, init, dict(name=name), augment, **objective)
    config.image_size = (size, size)
    with config.unlocked():
        config.objective.update(head=head, inputs=inputs)
        config.optimizer.layer_decay = 0.75
    return config


def classes(config: ConfigDict, num_classes: int) -> ConfigDict:
    """Declare the target of a semantic segmentation."""
    with config.unlocked():
        config.modalities.semseg = dict(RGB_LABELS, num_classes=num_classes)
    return config


def depth_input() -> dict:
    """Depth as MultiMAE saw it in pretraining: standardized per picture; holes are 0."""
    return dict(common.modalities().depth.to_dict(), missing=0.0)


JITTER = dict(probability=0.5, brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.8, 1.2), hue=(-0.1, 0.1))
LARGE_SCALE = dict(crop="large_scale_jitter", factor=(0.1, 2.0), flip=0.5, color_jitter=JITTER)
CONVNEXT = dict(name="convnext", width=6144, preds_per_patch=16, depth=4)


def multimae_segmentation(
    name: str, num_classes: int, size: int, epochs: int, batch: int, every: str, inputs: tuple[str, ...] = ("rgb",), test: str = "val"
) -> ConfigDict:
    """MultiMAE's semantic segmentation: ConvNeXt head, padded squares, no resizing back; with depth the head still reads rgb."""
    goal = dict(name="segmentation", target="semseg")
    config = dense(goal, CONVNEXT, "checkpoints/multimae_b", name, size, LARGE_SCALE, inputs, drop_path=0.1)
    classes(config, num_classes)
    with config.unlocked():
        if "depth" in inputs:
            config.modalities.depth = depth_input()
            if name == "nyuv2":
                config.modalities.depth.metres_per_count = 10 / 65536
        if "rgb" not in inputs:
            del config.modalities["rgb"]
            del config.data.augment["color_jitter"]
    run_for(config, epochs, 1, batch, absolute(1e-4, batch))
    source = dict(config.data.train.to_dict(), split=test)
    return watch(
        config, "segmentation/mean_iou", every, type="segmentation", protocol=f"{name}_padded_{size}", batch_size=batch, data_from=source
    )


def multimae_depth() -> ConfigDict:
    """MultiMAE's NYUv2 depth: DPT head, reverse Huber, crops of 256."""
    colors = dict(probability=0.5, brightness=(0.8745, 1.1255), contrast=(0.6, 1.4), saturation=(0.5, 1.5), hue=(-0.2, 0.2))
    augment = dict(crop="shortest", flip=0.5, color_jitter=colors, gray=0.3)
    goal, head = dict(name="regression", target="depth", loss="berhu"), dict(name="dpt", form="regression")
    config = dense(goal, head, "checkpoints/multimae_b", "nyuv2", 256, augment)
    with config.unlocked():
        # In meters; the reference's own mean and deviation, which fit millimeters and not what its files hold.
        config.modalities.depth = dict(
            channels=1, patch=16, loss="l1", scale=10 / 65536, mean=(2.0707764,), std=(0.7775723,), missing=0.0, metres_per_count=10 / 65536
        )
    config.optimizer.weight_decay = 1e-4
    config.objective.compute_dtype = "float32"
    run_for(config, 2000, 100, 128, absolute(1e-4, 128))
    source = dict(config.data.train.to_dict(), split="test")
    return watch(config, "depth/delta_1", "250 epochs", type="depth", protocol="nyuv2_depth_256", batch_size=96, data_from=source)


# Target: (channels, stored value times this is the target, what is stored where there is none).
TASKONOMY = {
    "depth": (1, 1 / 8000, 65535.0),
    "edge_texture": (1, 4 / 65535, 65535.0),
    "edge_occlusion": (1, 1 / 65535, 65535.0),
    "keypoints2d": (1, 1 / 65535, 65535.0),
    "keypoints3d": (1, 1 / 65535, 65535.0),
    "normal": (3, 1 / 255, -1.0),
    "principal_curvature": (2, 1 / 255, -1.0),
    "reshading": (1, 1 / 255, -1.0),
}


def multimae_taskonomy(target: str) -> ConfigDict:
    """MultiMAE's transfer to one task of Taskonomy's tiny split: 800 pictures, DPT head, masked L1, no augmentation."""
    channels, scale, missing = TASKONOMY[target]
    goal, head = dict(name="regression", target=target, loss="l1"), dict(name="dpt", form="regression")
    augment = dict(crop="shortest", flip=0.0)
    config = dense(goal, head, "checkpoints/multimae_b", "taskonomy", 384, augment, drop_path=0.1)
    with config.unlocked():
        config.modalities[target] = dict(channels=channels, patch=16, loss="l1", scale=scale, missing=missing)
        if target == "depth":
            config.modalities.depth.metres_per_count = 1 / 512
    run_for(config, 100, 5, 8, absolute(3e-4, 8))
    return watch(config, "maps/l1", "5 epochs", mode="min", type="maps", protocol="taskonomy_384", batch_size=12)


def upernet(
    encoder: str, init: str, rate: float, layer_decay: float, drop_path: float, protocol: str = "ade20k_sliding_512", **objective
) -> ConfigDict:
    """UPerNet on ADE20K as mmsegmentation trains it: crops of 512, 160,000 steps of 16 pictures, linear decay of the rate."""
    augment = dict(crop="ratio_range", flip=0.5, photometric_distortion=dict())
    goal = dict(name="segmentation", target="semseg", auxiliary=0.4)
    config = dense(goal, dict(name="upernet"), init, "ade20k", 512, augment, drop_path=drop_path, **objective)
    classes(config, 150)
    config.objective.encoder = encoder
    config.optimizer.layer_decay = layer_decay
    config.total = "160000 steps"
    config.global_batch = 16
    config.optimizer.base_lr = absolute(rate, 16)
    # 1,263 steps of 16 are an epoch of 20,210 pictures.
    config.schedule = dict(
        name="polynomial", power=1.0, start_factor=1e-6 / rate, total_epochs=160000 / 1263, start_epochs=0.0, warmup_epochs=1500 / 1263,
        min_lr=0.0,
    )  # fmt: skip
    return watch(config, "segmentation/mean_iou", "16000 steps", type="segmentation", protocol=protocol, batch_size=16)


# Probes of a frozen encoder

FROZEN = ("inputs/.*", "global_tokens", "encoder/.*")


def probe(encoder: str, init: str, head: dict, **objective) -> ConfigDict:
    """A classifier of ImageNet-1K on frozen features, trained on augmented pictures."""
    goal = dict(name="classification", num_classes=1000)
    config = task(encoder, goal, init, dict(name="imagenet"), CROPS, **objective)
    config.objective.head = head
    with config.unlocked():
        config.optimizer = dict(name="lars", base_lr=0.1, weight_decay=0.0, momentum=0.9, frozen=FROZEN)
    return watch(config, "accuracy/top1", "1 epochs", type="classification", protocol="imagenet_224", batch_size=1024)


def mae_linear_probe(encoder: str, init: str, epochs: int) -> ConfigDict:
    """MAE's linear probe: the class token behind the final norm, batch normalization without scale and shift, LARS."""
    frozen = dict(positions="columns_first", final_norm=True)
    config = probe(encoder, init, dict(name="probe", source="global"), **frozen)
    if encoder == "H":
        config.modalities.rgb.patch = 14
    config.data.augment.crop = "random_resized_once"
    config.optimizer.frozen = (*FROZEN, "norm/.*")
    return run_for(config, epochs, 10, 16384, 0.1)


def attentive_probe(encoder: str, init: str, **objective) -> ConfigDict:
    """Efficient probing: 32 queries, no norm of the encoder, batch 4096."""
    config = probe(encoder, init, dict(name="attentive", pooling="ep", queries=32), **objective)
    config.data.augment.crop = "random_resized_once"
    return run_for(config, 90, 10, 4096, 0.1)


def sgd_probe(encoder: str, init: str, source: str, blr: float, batch: int, layers: tuple[int, ...] = ()) -> ConfigDict:
    """DINO's and iBOT's linear probe of the teacher: SGD, no decay, the rate constant within an epoch."""
    config = probe(encoder, init, dict(name="probe", source=source, batch_norm=False), **{**DISTILLED, "pool": "global"})
    with config.unlocked():
        config.objective.layers = layers
        config.optimizer = dict(name="sgd", base_lr=blr, momentum=0.9, weight_decay=0.0, frozen=(*FROZEN, "norm/.*", "global_pos_embed"))
        config.schedule.name = "cosine_per_epoch"
    config.init_from.weights = "teacher"
    return run_for(config, 100, 0, batch, blr)


def multimae_linear_probe(init: str) -> ConfigDict:
    """MAE's linear probe on MultiMAE's global token; MultiMAE has no final norm."""
    config = probe("B", init, dict(name="probe", source="global"))
    config.data.augment.crop = "random_resized_once"
    return run_for(config, 90, 10, 16384, 0.1)


def ibot_imagenet(encoder: str, init: str, epochs: int, drop_path: float, layer_decay: float) -> ConfigDict:
    """iBOT's fine-tuning of the teacher: the class token, no mixing."""
    config = imagenet(encoder, init, erasing=0.25, drop_path=drop_path, layer_decay=layer_decay, **DISTILLED)
    config.objective.task.update(mixup=0.0, cutmix=0.0)
    config.init_from.weights = "teacher"
    return run_for(config, epochs, 20, 1024, 1e-3, min_lr=1e-6)


# Rendered scenes

SCENES_HEAD = dict(name="linear")


def scenes_task(
    goal: dict, head: dict, evaluator: str, epochs: int, encoder: dict, data: dict, inputs: tuple[str, ...] = ("rgb",), **subset
) -> ConfigDict:
    """A task on rendered scenes of 64 x 64 pixels, evaluated once, at the end, on the split "val"."""
    config = task("B", goal, "", {}, dict(crop="random_resized", scale=(0.5, 1.0), flip=0.5), drop_path=0.1, pool="all")
    modalities, target = common.scenes().modalities, goal.get("target")
    with config.unlocked(), config.ignore_type():
        config.image_size = (64, 64)
        config.modalities = {name: modalities[name].to_dict() for name in inputs}
        if target == "semseg":
            config.modalities.semseg = dict(modalities.semseg.to_dict(), stride=1, missing=-1)
        if target == "depth":
            # Counts of 1/512 m; mean and deviation are the scenes'.
            config.modalities.depth = dict(modalities.depth.to_dict(), standardize=False, scale=1 / 512, mean=(8.0,), std=(5.4,))
        config.objective.update(inputs=inputs, encoder=encoder, head=head, compute_dtype="float32")
        config.data.train = dict(data, split="train", **subset)
        config.data.workers = 0
        config.optimizer.layer_decay = 0.75
        block = dict(type=evaluator, every="100 percent", crop=1.0, batch_size=250, data_from=dict(data, split="val"))
        config.evaluators = {evaluator: block}
    config.picture_every = "0 steps"
    config.checkpoint = dict(every="100 percent", keep=1)
    return run_for(config, epochs, max(1, epochs // 10), 64, 4e-3)
