"""What the shipped experiments share, as plain data, and `smoke`, which shrinks any of them to a test's size.

An experiment is one file whose `get_config()` starts from a block here and changes what makes it that experiment. Every
key is a constructor's argument; a key that no constructor has is an error that lists the known ones.
"""

from ml_collections import ConfigDict, config_dict

INPUTS = ("rgb", "depth", "semseg")


def modalities() -> ConfigDict:
    """rgb, depth and semseg as in the public MultiMAE checkpoint: any other modality is declared the same way."""
    return ConfigDict(
        dict(
            rgb=dict(
                kind="continuous", channels=3, patch=16, loss="mse", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
            ),
            # Stored as 16-bit counts of 1/512 m; the model sees count / 2**16, standardized. A sensor's depth has holes:
            # missing=0.0 says that the count 0 means "not measured".
            depth=dict(
                kind="continuous",
                channels=1,
                patch=16,
                loss="l1",
                scale=1 / 65536,
                standardize=True,
                missing=config_dict.placeholder(float),
                metres_per_count=1 / 512,
            ),
            semseg=dict(kind="categorical", num_classes=133, patch=16, stride=4, loss="cross_entropy", embed_dim=64),
        )
    )


def multimae_b() -> ConfigDict:
    """MultiMAE-B from scratch: 98 of 588 tokens visible at random, the published recipe, 1600 epochs at batch 2048."""
    return ConfigDict(
        dict(
            seed=0,
            image_size=(224, 224),
            total="1600 epochs",
            # The recipe's 2,048 even on one card: what does not fit at once is processed in micro-batches.
            global_batch=2048,
            micro_batch=0,  # samples at once over all devices; 0 = the largest that fits
            modalities=modalities(),
            objective=dict(
                name="multimae",
                inputs=INPUTS,
                outputs=("rgb", "depth", "semseg", "norm_rgb"),
                encoder=dict(width=768, depth=12, heads=12),
                decoder=dict(width=256, depth=2, heads=8),
                num_global_tokens=1,
                num_visible=98,
                scores=dict(name="random"),
                budget=dict(name="dirichlet", alphas=1.0),
                guidance=dict(),
                compute_dtype="bfloat16",
                remat=False,
            ),
            optimizer=dict(
                base_lr=1e-4,  # times global_batch / 256
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                weight_decay=0.05,
                no_decay=(),  # norms and biases decay too
                clip_norm=config_dict.placeholder(float),
            ),
            schedule=dict(total_epochs=1600.0, start_epochs=0.0, warmup_epochs=40.0, min_lr=0.0),
            data=dict(
                train=dict(source="tfds", name="multimodal_folder", data_dir="data", split="train"),
                augment=dict(crop="random_resized", scale=(0.2, 1.0), ratio=(0.75, 4 / 3), flip=0.5, resize="pil"),
                workers=8,
                prefetch=2,
            ),
            evaluators=dict(),
            init_from=dict(path="", fresh=(), drop=()),
            log_every=50,
            picture_every="5 epochs",
            checkpoint=dict(every="1 epochs", keep=3),
            writers=(),
        )
    )


def masked_autoencoder(name: str, encoder: str, **objective) -> ConfigDict:
    """MAE or CrossMAE of the published recipe: rgb alone, a quarter of the tokens shown, normalized pixels rebuilt, batch 4096.

    Weights decay, and so do the tokens; norms, biases and position tables do not. Differs from the reference in two ways that
    should not matter: bfloat16 without a loss scale instead of float16, and a warm-up that reaches its peak one step earlier.
    """
    config = multimae_b()
    with config.unlocked():
        config.modalities = dict(rgb=config.modalities.rgb)
        config.objective = dict(
            name=name,
            inputs=("rgb",),
            outputs=("norm_rgb",),
            mask_ratio=0.75,
            encoder=encoder,
            decoder=dict(),
            scores=dict(name="random"),
            guidance=dict(),
            compute_dtype="bfloat16",
            remat=False,
            **objective,
        )
        config.optimizer.no_decay = (".*bias", r".*norm\w*/scale")
        if encoder == "H":
            config.modalities.rgb.patch = 14
    config.optimizer.base_lr = 1.5e-4
    config.global_batch = 4096
    return config


def crossmae(encoder: str, kept_mask_ratio: float) -> ConfigDict:
    """CrossMAE, 800 epochs; the learning rate is scaled by the share of the hidden tokens that is rebuilt, as in the reference."""
    config = masked_autoencoder("crossmae", encoder, kept_mask_ratio=kept_mask_ratio)
    config.optimizer.base_lr = 1.5e-4 * kept_mask_ratio / config.objective.mask_ratio
    config.total = "800 epochs"
    config.schedule.total_epochs = 800.0
    return config


def attg(encoder: str) -> ConfigDict:
    """AttG with TokenCut's maps: MAE whose loss weighs a patch exp(g / 0.75), 800 epochs at batch 512 on one card."""
    config = masked_autoencoder("mae", encoder, loss_weight=dict(tau=0.75))
    with config.unlocked():
        config.objective.guidance = dict(name="stored", path="data/multimodal_folder_tokencut")
    config.global_batch = 512
    config.total = "800 epochs"
    config.schedule.total_epochs = 800.0
    return config


def attention_guided(config: ConfigDict, scores: str = "attention_high", query: str = "global") -> ConfigDict:
    """Hide what the model attends to most (or least): one extra forward pass over all tokens per step."""
    config.objective.scores = dict(name=scores)
    config.objective.guidance = dict(name="self_attention", query=query)
    return config


def continue_multimae_b() -> ConfigDict:
    """100 more epochs from the converted public checkpoint, on the tail (epoch 1500 to 1600) of its schedule."""
    config = multimae_b()
    config.total = "100 epochs"
    config.schedule.start_epochs = 1500.0
    config.init_from.path = "checkpoints/multimae_b"
    return config


def distillation_s(name: str, epochs: float, global_batch: int) -> ConfigDict:
    """What the published DINO and iBOT runs of a ViT-S/16 share: views, optimizer, schedules. `name`: "dino" or "ibot"."""
    config = ConfigDict(
        dict(
            seed=0,
            image_size=(224, 224),
            total=f"{epochs:g} epochs",
            global_batch=global_batch,
            micro_batch=0,
            modalities=dict(rgb=modalities().rgb),
            objective=dict(
                name=name,
                inputs=("rgb",),
                encoder=dict(width=384, depth=12, heads=6),
                projection=dict(hidden=2048, bottleneck=256, num_prototypes=8192, fixed_scale=False),
                teacher_momentum=0.996,
                momentum_over=f"{epochs:g} epochs",
                center_momentum=0.9,
                teacher_temperature=(0.04, 0.07),
                temperature_warmup="30 epochs",
                drop_path=0.1,
                compute_dtype="bfloat16",
                remat=False,
            ),
            optimizer=dict(
                base_lr=5e-4,  # times global_batch / 256
                b1=0.9,
                b2=0.999,
                eps=1e-8,
                weight_decay=(0.04, 0.4),
                no_decay=(".*bias", r".*norm\d?/scale"),  # the class token, positions and the prototypes' lengths do decay
                clip_tensor_norm=3.0,
                freeze=dict(parameters="projection/(patch_)?prototypes/.*", until="1 epochs"),
            ),
            # The published floor of 1e-6 is not scaled with the batch, ours is.
            schedule=dict(total_epochs=float(epochs), start_epochs=0.0, warmup_epochs=10.0, min_lr=1e-6 * 256 / global_batch),
            data=dict(
                train=dict(source="tfds", name="multimodal_folder", data_dir="data", split="train"),
                augment=dict(
                    scale=(0.25, 1.0),
                    ratio=(0.75, 4 / 3),
                    flip=0.5,
                    resize="pil",
                    views=dict(local_crops=10, local_size=(96, 96), local_scale=(0.05, 0.25)),
                ),
                workers=8,
                prefetch=2,
            ),
            evaluators=dict(knn=dict(type="knn", every="20 epochs", ks=(10, 20, 100, 200))),
            init_from=dict(path="", fresh=(), drop=()),
            log_every=50,
            picture_every="5 epochs",
            checkpoint=dict(every="1 epochs", keep=3),
            writers=(),
        )
    )
    if name == "ibot":
        with config.unlocked():
            config.objective.patch_temperature = (0.04, 0.07)
    return config


def attmask_s() -> ConfigDict:
    """iBOT with the student's masks chosen by the teacher's attention, highest first; 100 epochs of ImageNet-1K at batch 240."""
    config = distillation_s("ibot", epochs=100, global_batch=240)
    with config.unlocked():
        config.objective.scores = dict(name="attention_high")
        config.objective.masking = dict(ratio=0.3, ratio_var=0.2, probability=0.5, per="step")
    return config


def scenes() -> ConfigDict:
    """A small MultiMAE on rendered 64 x 64 scenes: the same code as at full size, for a CPU and minutes."""
    config = multimae_b()
    config.image_size = (64, 64)
    for name in INPUTS:
        config.modalities[name].patch = 8
    config.modalities.depth.missing = 0.0  # the sky
    config.modalities.semseg.num_classes = 14
    config.modalities.semseg.embed_dim = 16
    with config.unlocked():
        config.objective.encoder = dict(width=128, depth=4, heads=2)
        config.objective.decoder = dict(width=64, depth=1, heads=2)
        config.data.train = dict(source="tfds", name="scenes", data_dir="runs/demo/data", split="train")
    config.objective.num_visible = 32
    config.objective.compute_dtype = "float32"
    config.data.workers = 0
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """The same experiment, shrunk: same code, same objective and schedule form, sizes for a few seconds on a CPU."""
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.image_size = (32, 32)
        for name in config.modalities:
            config.modalities[name].patch = 8
        config.objective.encoder = dict(width=32, depth=1, heads=2)
        if config.objective.name == "supervised":
            _smoke_task(config)
        if "projection" in config.objective:
            config.objective.projection.update(hidden=32, bottleneck=16, num_prototypes=32)
            config.data.augment.views.update(local_crops=2, local_size=(16, 16))
        if "decoder" in config.objective:
            config.objective.decoder = dict(config.objective.decoder.to_dict(), width=16, depth=1, heads=2)
        if "num_visible" in config.objective:
            config.objective.num_visible = 8
        config.total = "2 steps"
        config.global_batch = 8
        config.micro_batch = 4
        config.data.workers = 0
        config.log_every = 1
        config.picture_every = "2 steps"
        config.checkpoint = dict(every="1 steps", keep=2)
        config.init_from = dict(path="", fresh=(), drop=())
        for name in config.evaluators:
            config.evaluators[name].every = "2 steps"
    return config


def _smoke_task(config: ConfigDict) -> None:
    """Small heads, and blocks enough for those that read several."""
    if len(config.objective.get("layers", ())) > 1:  # of a probe
        config.objective.layers = (1, 2)
        config.objective.encoder.depth = 2
    small = {
        "convnext": dict(width=64, preds_per_patch=16, depth=1), "dpt": dict(width=8, layer_dims=(4, 8, 8, 8)),
        "upernet": dict(width=16, auxiliary_width=8), "attentive": dict(queries=4),
    }  # fmt: skip
    head = config.objective.head.to_dict()
    config.objective.head = {**head, **small.get(head.get("name"), {})}
    if head.get("name") in ("dpt", "upernet"):
        config.objective.encoder.depth = 4
    for evaluator in config.evaluators.values():
        evaluator.batch_size = 8
        protocol = evaluator.get("protocol", "")
        if protocol:  # of pictures of full size: the same ways of cutting without its name
            del evaluator["protocol"]
            evaluator.crop = (
                "pad" if "padded" in protocol else "shortest" if "depth" in protocol else None if "sliding" in protocol else 1.0
            )
        if "sliding" in protocol:
            evaluator.options = dict(resolution="original", sliding=dict(window=32, stride=16))


CONTINUATIONS = ("random", "high", "low", "stochastic", "random_heads", "high_ten_times", "high_restarted")


def on_the_tail(config: ConfigDict, epochs: float) -> ConfigDict:
    """A pretraining of so many epochs, continued for one sixteenth more on the tail of its schedule."""
    config.total = f"{epochs / 16:g} epochs"
    config.schedule.start_epochs = epochs * 15 / 16
    return config


def continuations(epochs: float, guidance: dict, base_lr: float, stages: dict[str, tuple[str, ...]]) -> dict[str, dict]:
    """Cells of a sweep: a pretraining with random masks of so many epochs at that rate, continued for 1/16 of them in `CONTINUATIONS`.

    `stages`: {a function of the experiment's file that fine-tunes: which continuations it follows}, beside `none`, the pretraining
    itself, and `from_random` initialization. The file's function `continued` is the pretraining on the tail of its schedule. Each
    cell is compared with the one of equal compute: those with guidance with `random`, `random` and `from_random` with `none`.
    """
    guided, high = {"objective.guidance": guidance}, {"objective.scores": dict(name="attention_high")}
    ways = {
        "random": {},
        "high": {**guided, **high},
        "low": {**guided, "objective.scores": dict(name="attention_low")},
        "stochastic": {**guided, "objective.scores": dict(name="attention_stochastic", alpha=0.5)},
        "random_heads": {"objective.guidance": dict(guidance, heads="random"), **high},
        "high_ten_times": {**guided, **high, "optimizer.base_lr": 10 * base_lr},
        "high_restarted": {
            **guided, **high, "schedule.start_epochs": 0.0, "schedule.total_epochs": epochs / 16, "schedule.warmup_epochs": epochs / 80,
        },
    }  # fmt: skip
    against = {name: "none" if name in ("random", "from_random") else "random" for name in (*ways, "from_random")}
    cells: dict[str, dict] = {"none": {}}
    cells |= {name: dict(changes, config="continued", after="none", against=against[name]) for name, changes in ways.items()}
    for stage, chosen in stages.items():
        compared = {name: f"{stage}_{other}" for name, other in against.items()}
        cells[f"{stage}_none"] = dict(config=stage, after="none", against=f"{stage}_none")
        cells |= {f"{stage}_{name}": dict(config=stage, after=name, against=compared[name]) for name in chosen}
        cells[f"{stage}_from_random"] = dict(config=stage, against=compared["from_random"])
    return cells
