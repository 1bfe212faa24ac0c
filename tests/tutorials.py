"""The commands that README and docs print, and how each of them is run in a small form by tests/test_tutorials.py, or why it is not.

`ROWS` is one table per page: {beginning of a printed command: its small form, or the reason why it is not run}. The longest beginning
that fits counts. A command without a row, and a row without a command, fail the test.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from tests.runs import ROOT
from tests.tiny import tiny_batch

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "methods").glob("*.md"))]
# What begins a line of a fenced block that is to be typed.
PROGRAMS = ("python", "maskvit", "make", "tensorboard", "gcloud", "srun", "source", "pip", "docker", "uv")
PUBLIC = "multimae-b_98_rgb+-depth-semseg_1600e_multivit-afff3f8c.pth"


@dataclass(frozen=True)
class Small:
    """How a printed command is run here.

    `add`: words behind it. `words`: {part of a word that is printed: what stands there here}; "{README}" is the folder in which
    README's commands were run. `folder`: commands of a page that share one are run there in their order. `makes`: patterns of files that
    must be there afterwards and hold something. `says`: what it must print.
    """

    add: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    folder: str = "page"
    makes: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A printed command, on one line and without its comment; `row`: its key of the page's table, None where it has none."""

    page: str
    line: str
    row: str | None


@dataclass(frozen=True)
class Walk:
    """The commands of a page that are run in one folder, in the order in which they are printed."""

    page: str
    folder: str
    commands: tuple[Command, ...]


# What makes a run short, whatever the model.
SHORT = (
    "--config.total=2 steps",
    "--config.global_batch=8",
    "--config.micro_batch=8",
    "--config.checkpoint.every=2 steps",
    "--config.log_every=1",
    "--config.data.workers=0",
    "--config.objective.compute_dtype=float32",
)
# The sizes of `vit_base.safetensors` as `make_inputs` writes it.
SMALL_VIT = (
    "--config.image_size=(32, 32)",
    "--config.modalities.rgb.patch=8",
    "--config.objective.encoder={'width': 64, 'depth': 1, 'heads': 1}",
)
SMALL_MAE = (
    "--config.objective.encoder={'width': 32, 'depth': 1, 'heads': 2}",
    "--config.objective.decoder={'width': 16, 'depth': 1, 'heads': 2}",
)
ONE_OUTPUT = "--config.objective.outputs=('rgb',)"  # one decoder compiles faster than three
# Those of assets/multimae_scenes.pth, which stands for the public MultiMAE-B.
SMALL_MULTIMAE = (
    "--config.image_size=(64, 64)",
    *(f"--config.modalities.{name}.patch=8" for name in ("rgb", "depth", "semseg")),
    "--config.modalities.semseg.num_classes=14",
    "--config.modalities.semseg.embed_dim=16",
    "--config.objective.encoder={'width': 128, 'depth': 4, 'heads': 2}",
    "--config.objective.decoder={'width': 64, 'depth': 1, 'heads': 2}",
    "--config.objective.num_visible=32",
)
# The protocol of the shipped config is one of pictures of 224 pixels.
SMALL_ACCURACY = "--config.evaluators={'accuracy': {'type': 'classification', 'every': '1 steps', 'batch_size': 8}}"
RUN = ("metrics.jsonl", "parameters.txt", "checkpoints/2/manifest.json")
EVERY_TWO = ("--config.picture_every=2 steps", "--config.evaluators.knn.every=2 steps")
NEW_PHOTOS = 3
FEW_SCENES = ("--num_train", "24", "--num_val", "8", "--size", "48")

# The config that docs/data.md checks, of the data that it packs.
PICTURES = """from configs import common


def get_config():
    config = common.multimae_b()
    config.data.train.name = "mine"
    config.modalities.depth.update(metres_per_count=0.001, missing=0.0)
    with config.unlocked():
        config.modalities.semseg.update(num_classes=40, missing=255)
    return config
"""

HOURS = "hours at its full size; tests/test_sweep.py runs sweeps in a small form"
IMAGENET = "needs ImageNet and days of GPUs; tests/test_train.py and tests/test_fine_tuning.py run the smoke forms of the shipped configs"
SEVERAL = "needs several machines; tests/test_processes.py and tests/test_topologies.py run two processes"
DOWNLOAD = "downloads"
PLUGIN = "needs JAX's CUDA plugin; tests/test_plan.py plans for this machine, and for GPUs where it is installed"


def run_in(workdir: str, *more: str) -> tuple[str, ...]:
    """What a finished run of two steps leaves in `workdir`."""
    return tuple(f"{workdir}/{name}" for name in (*RUN, *more))


FINE_TUNE = Small(add=(*SHORT, *SMALL_VIT, SMALL_ACCURACY), makes=run_in("runs/my", "results.jsonl"))
PACK = "python -m maskvit data folder --root photos --data_dir data --name photos --modalities rgb"
CONVERT_SCENES = "python convert_torch_checkpoint.py --src assets/multimae_scenes.pth --dst checkpoints/scenes"

ROWS: dict[str, dict[str, Small | str]] = {
    "README.md": {
        "make demo": "six to eight minutes; tests/test_demo.py builds its page",
        "make docs": "tests/test_site.py builds the site",
        "make test": "is this",
        "python -m maskvit init photos": Small(makes=("photos.py",), says=("python -m maskvit train --config=photos.py",)),
        "python -m maskvit data folder --root photos": Small(makes=("data/photos/*/dataset_info.json",)),
        "python -m maskvit train --config=photos.py": Small(
            add=(*SHORT, *SMALL_MAE, "--config.picture_every=2 steps"), makes=run_in("runs/photos", "results.jsonl", "pictures/*.png")
        ),
        f"python convert_torch_checkpoint.py --src {PUBLIC}": Small(makes=("checkpoints/multimae_b/conversion.txt",)),
        "python -m maskvit data pseudolabel --help": Small(says=("--depth", "--semseg")),
        "python -m maskvit data folder --root pictures": Small(
            words={"semseg": "semseg,num_classes=14"}, makes=("data/multimodal_folder/*/dataset_info.json",)
        ),
        "python main.py --config=configs/pretrain/multimae_b_attention_tail.py": Small(
            add=(*SHORT, *SMALL_MULTIMAE), makes=run_in("runs/attention_tail"), says=("steps 0 to 2",)
        ),
        "python convert_torch_checkpoint.py --src vit_base.safetensors": Small(makes=("checkpoints/vit_b/conversion.txt",)),
        "python -m maskvit data folder --root my": Small(makes=("data/my/*/dataset_info.json",)),
        "python main.py --config=configs/finetune/own_classes.py": FINE_TUNE,
        "python -m maskvit predict": Small(makes=("answers/index.html", "answers/predictions.csv")),
    },
    "docs/checkpoints.md": {
        "python convert_torch_checkpoint.py --src FILE --inspect": Small(words={"FILE": "vit_base.safetensors"}, says=("sha256", "ViT")),
        "python convert_torch_checkpoint.py --src FILE --dst": Small(
            words={"FILE": "vit_base.safetensors"}, makes=("checkpoints/x/conversion.txt",)
        ),
        "python convert_torch_checkpoint.py --src RUN --dst x.safetensors": Small(words={"RUN": "checkpoints/x"}, makes=("x.safetensors",)),
        "python convert_torch_checkpoint.py --src RUN --dst FOLDER": Small(
            words={"RUN": "checkpoints/x"}, makes=("FOLDER/README.md", "FOLDER/config.json", "FOLDER/model.safetensors")
        ),
        "python -m maskvit push": "uploads; tests/test_hub.py has a stand-in for the hub",
        "python -m maskvit pull": "downloads; tests/test_hub.py has a stand-in for the hub",
        "python -m maskvit export": Small(words={"RUN": "{README}/runs/my"}, makes=("model.stablehlo", "model.stablehlo.json")),
    },
    "docs/clusters.md": {
        "python main.py --config=configs/pretrain/multimae_b_attention_tail.py": "as in README, where it is run",
        "source .venv/bin/activate": "part of a job of SLURM",
        "srun": SEVERAL,
        "python main.py --coordinator": SEVERAL,
        "gcloud": "needs TPUs",
        "python main.py --cluster": SEVERAL,
    },
    "docs/data.md": {
        "python -m maskvit data folder": Small(words={"/my/pictures": "pictures"}, makes=("data/mine/*/dataset_info.json",)),
        "python main.py --config=... --config.data.train.name=mine": Small(
            words={"--config=...": "--config=configs/pretrain/multimae_b_1600e.py"},
            add=("--workdir=runs/mine", "--config.global_batch=8", "--config.data.workers=0", "--config.total=0", *SMALL_MAE),
            says=("nothing to train",),
        ),
        "python -m pip install": "installs torch",
        "python -m maskvit data pseudolabel": DOWNLOAD + " two models; tests/test_pseudolabel.py has stand-ins",
        "python -m maskvit data check": Small(makes=("data.png",), says=("semseg",)),
    },
    "docs/data_sets.md": {"python -m maskvit data NAME": "stands for data sets to be downloaded; tests/data/ packs small copies"},
    "docs/experiments.md": {
        "python -m maskvit data scenes --data_dir data/": Small(add=FEW_SCENES, makes=("data/*/scenes/*/dataset_info.json",)),
        "python -m maskvit data fashion_mnist": DOWNLOAD + " its archives",
        "python -m maskvit sweep": HOURS,
        "python -m maskvit report compare": "reads the sweep above; docs/reading_a_run.md has one that is run",
    },
    "docs/fine_tuning.md": {
        "python main.py --config=configs/finetune/multimae_b_imagenet.py": IMAGENET,
        CONVERT_SCENES: Small(makes=("checkpoints/scenes/conversion.txt",)),
        "python -m maskvit data folder": Small(makes=("data/photos/*/dataset_info.json",)),
        "python main.py --config=photos.py": Small(
            add=(*SHORT, "--config.evaluators.accuracy.every=1 steps", "--config.evaluators.accuracy.batch_size=8"),
            makes=("runs/photos/metrics.jsonl",),
            says=("step 2/2", "its checkpoint is kept as best"),
        ),
        "python -m maskvit predict": Small(makes=("answers/predictions.csv",)),
        "python main.py --config=configs/finetune/own_classes.py": "README's, which is run, with the checkpoint that the config names",
    },
    "docs/guidance_cost.md": {
        "python -m maskvit bench guidance --batch 8": "minutes at its size; tests/test_bench.py runs its functions on a small model",
        "python -m maskvit bench guidance --no-time": "needs a trained ViT; tests/test_bench.py runs its functions on a small model",
    },
    "docs/looking.md": {
        "python -m maskvit explore --checkpoint runs/demo/run --images DIR --out": Small(
            words={"runs/demo/run": "{README}/runs/attention_tail", "DIR": "new"}, makes=("page.html",)
        ),
        "python -m maskvit explore": "answers a browser until it is stopped; tests/test_explore.py has one",
        "python -m maskvit report features": Small(
            words={"runs/demo/run": "{README}/runs/attention_tail", "DIR": "new"}, makes=("features.html",)
        ),
    },
    "docs/nine_photos.md": {
        CONVERT_SCENES: Small(makes=("checkpoints/scenes/conversion.txt",)),
        "python -m maskvit data pictures": Small(makes=("scenes/labeled", "scenes/classes.txt")),
        "python -m maskvit segment --checkpoint checkpoints/scenes": Small(makes=("segmented/index.html",)),
        "python -m maskvit segment --checkpoint checkpoints/vit_b": "the command above, which is run, with files of yours",
    },
    "docs/objectives.md": {
        "python -m maskvit data scenes": Small(add=FEW_SCENES, makes=("data/objectives_scenes/scenes/*/dataset_info.json",)),
        "python -m maskvit sweep": HOURS,
    },
    "docs/own_config.md": {
        "python -m maskvit init ~/my/pictures": Small(words={"~": "."}, makes=("pictures.py",)),
        "python -m maskvit data folder": Small(words={"~": "."}, makes=("data/pictures/*/dataset_info.json",)),
        "python -m maskvit train --config=pictures.py": Small(add=(*SHORT, *SMALL_MAE, ONE_OUTPUT), makes=run_in("runs/pictures")),
        "python main.py --config=pictures.py": Small(add=(*SHORT, *SMALL_MAE, ONE_OUTPUT), makes=run_in("runs/color")),
        "maskvit demo": "six to eight minutes; tests/test_demo.py builds its page",
        "maskvit train": IMAGENET,
    },
    "docs/own_data.md": {
        "python -m maskvit init photos": Small(makes=("photos.py",)),
        f"{PACK} --val_fraction 0.1": Small(makes=("data/photos/*/dataset_info.json",)),
        "python -m maskvit data check": Small(makes=("check.png",)),
        "python convert_torch_checkpoint.py": Small(folder="labels", makes=("checkpoints/vit_b/conversion.txt",)),
        "python -m maskvit data folder --root my --data_dir data --name photos": Small(
            folder="labels", makes=("data/photos/*/dataset_info.json",)
        ),
        "python main.py": "README's, which is run, with another number of classes",
        "python -m maskvit features": Small(folder="labels", makes=("features.npz",)),
        "python -m maskvit init photos --checkpoint": Small(
            folder="continued", words={"checkpoints/multimae_b": "{README}/checkpoints/multimae_b"}, makes=("photos.py",)
        ),
        PACK: Small(folder="continued", words={"0.02": "0.1"}, makes=("data/photos/*/dataset_info.json",)),
        "python -m maskvit train --config=photos.py --workdir=runs/photos --config.best": Small(
            folder="continued",
            add=(*SHORT, "--config.evaluators.knn.every=1 steps"),
            makes=run_in("runs/photos"),
            says=("knn/mean/top1_k20",),
        ),
        "python -m maskvit init photos --image_size": Small(folder="large", makes=("photos.py",)),
        f"{PACK} --val_fraction 0.02 --short_side 256 --workers": Small(
            folder="large", words={"0.02": "0.1"}, add=("--workers", "2"), makes=("data/photos/*/dataset_info.json",)
        ),
        "python -m maskvit bench loader": Small(folder="large", add=("--workers", "0", "--batch", "4", "--steps", "2")),
        "python -m maskvit plan": PLUGIN,
        "python -m maskvit train --config=photos.py --workdir=runs/photos": "README's, which is run, at another size of the pictures",
        "python -m maskvit data folder --root my --data_dir data --name mine": Small(
            folder="lacking", makes=("data/mine/*/dataset_info.json",)
        ),
        "python -m maskvit init tiles": Small(folder="tiles", makes=("tiles.py",)),
        "python -m maskvit data folder --root tiles": Small(folder="tiles", makes=("data/tiles/*/dataset_info.json",)),
        "python -m maskvit train --config=tiles.py": Small(
            folder="tiles", add=(*SHORT, *SMALL_MAE, ONE_OUTPUT), makes=run_in("runs/tiles")
        ),
    },
    "docs/reading_a_run.md": {
        "python -m maskvit data scenes": Small(add=FEW_SCENES, makes=("data/scenes/scenes/*/dataset_info.json",)),
        "python main.py --config=configs/pretrain/scenes.py --workdir=runs/scenes --config.total=100": Small(
            add=(*SHORT, *SMALL_MAE, ONE_OUTPUT, *EVERY_TWO), makes=run_in("runs/scenes", "pictures/*.png"), says=("step 2/2", "knn/")
        ),
        "python -m pip install": DOWNLOAD + " TensorBoard",
        "python main.py --config=configs/pretrain/scenes.py --workdir=runs/watched": Small(
            add=(*SHORT, *SMALL_MAE, ONE_OUTPUT, "--config.evaluators={}", "--config.picture_every=0"),
            makes=("runs/watched/tensorboard/events.*",),
        ),
        "tensorboard": "serves until it is stopped, and is no dependency; tests/test_metrics.py reads the event files back",
        "python -m maskvit report compare": Small(
            words={"runs/one": "runs/scenes", "runs/two": "{README}/runs/photos"}, makes=("compare.html",)
        ),
    },
    "docs/speed.md": {"python -m maskvit plan": PLUGIN},
    "docs/worth_it.md": {
        "make demo": "six to eight minutes; tests/test_demo.py builds its page",
        "python -m maskvit worth": "reads what the demo leaves, and takes minutes; tests/test_worth.py runs it on small runs",
    },
    "docs/methods/attention_guided.md": {
        "python convert_torch_checkpoint.py": "README's, where it is run",
        "python main.py --config=configs/pretrain/multimae_b_attention_tail.py": "README's, where it is run",
        "python main.py --config=configs/pretrain/multimae_b_random_tail.py": IMAGENET,
    },
    "docs/methods/attg.md": {
        "python -m maskvit maps": "needs ImageNet; tests/guidance/test_maps_command.py makes maps of a small data set",
        "python main.py": IMAGENET,
    },
    "docs/methods/index.md": {
        "python -m maskvit data scenes": Small(add=FEW_SCENES, makes=("data/methods_scenes/scenes/*/dataset_info.json",)),
        CONVERT_SCENES: Small(makes=("checkpoints/scenes/conversion.txt",)),
        "python -m maskvit report masks": Small(makes=("docs/methods/images/attention_guided.png",)),
    },
    **{
        f"docs/methods/{page}.md": {"python main.py": IMAGENET}
        for page in ("attmask", "block_masks", "crossmae", "dino", "hpm", "ibot", "mae", "milan_amt", "multimae", "self_guided")
    },
}


# What is printed


def commands() -> list[Command]:
    """Every command of a fenced block of README and docs, in the order of the pages."""
    found = []
    for path in PAGES:
        page = str(path.relative_to(ROOT))
        rows = ROWS.get(page, {})
        for language, block in re.findall(r"^ *```(\S*)\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            if language not in ("", "bash", "sh", "console"):
                continue
            for text in re.sub(r"\\\n\s*", " ", block).splitlines():
                line = re.sub(r"\s+", " ", re.sub(r"\s#.*", "", text)).strip()
                if line.partition(" ")[0] in PROGRAMS:
                    fitting = [beginning for beginning in rows if line.startswith(beginning)]
                    found.append(Command(page, line, max(fitting, key=len, default=None)))
    return found


def walks() -> list[Walk]:
    """The commands that are run, in the folders that they share; README first."""
    together: dict[tuple[str, str], list[Command]] = {}
    for command in commands():
        row = ROWS[command.page][command.row] if command.row else None
        if isinstance(row, Small):
            together.setdefault((command.page, row.folder), []).append(command)
    return [Walk(page, folder, tuple(found)) for (page, folder), found in together.items()]


# What a reader has before the first command


def make_inputs(folder: pathlib.Path, page: str) -> None:
    """Photos in classes, photos with depth and class maps, tiles of ten channels, checkpoints to convert, and the config a page prints."""
    classes = 12 if page == "README.md" else 3  # as the page says of `my`
    _photos(folder / "photos" / "rgb", 3, 8)
    _photos(folder / "my" / "rgb", classes, 8)
    _photos(folder / "new", 1, NEW_PHOTOS)
    _modalities(folder / "pictures", ("rgb", "depth", "semseg"))
    _modalities(folder / "tiles", ("rgb", "height", "s2"))
    if page == "docs/own_config.md":
        _modalities(folder / "my" / "pictures", ("rgb", "depth"))
    if page == "docs/own_data.md":  # depth of some of them
        for path in sorted((folder / "my" / "rgb").rglob("*.jpg"))[::2]:
            depth = folder / "my" / "depth" / path.parent.name / f"{path.stem}.png"
            depth.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((48, 64), 1500, np.uint16)).save(depth)
    if page == "docs/methods/index.md":
        (folder / "docs" / "methods" / "images").mkdir(parents=True)  # as in a checkout
    if page == "docs/data.md":
        (folder / "pictures.py").write_text(PICTURES)
    save_file(_vit(64, 1, 8, 4), folder / "vit_base.safetensors")
    (folder / PUBLIC).write_bytes((ROOT / "assets" / "multimae_scenes.pth").read_bytes())
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        if "def get_config" in block:
            (folder / "photos.py").write_text(block)


def _photos(folder: pathlib.Path, classes: int, each: int) -> None:
    """Pictures of 48 x 64 pixels in folders "class_0", "class_1", ..."""
    rng = np.random.default_rng(0)
    for index in range(classes * each):
        path = folder / f"class_{index % classes}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((64, 48)).save(path)


def _modalities(folder: pathlib.Path, names: Sequence[str]) -> None:
    """16 samples of 32 x 32 pixels: photos, depth in counts, class ids, heights and ten channels."""
    for start in (0, 8):
        batch = tiny_batch(8, seed=start)
        for index in range(8):
            depth = batch["depth"][index, :, :, 0].astype(np.uint16)
            found = {
                "rgb": batch["rgb"][index],
                "depth": depth,
                "semseg": batch["semseg"][index].repeat(4, 0).repeat(4, 1).astype(np.uint8),
                "height": depth[..., None].astype(np.float32),
                "s2": np.stack([depth] * 10, -1),
            }
            for name in names:
                path = folder / name / "all" / f"{start + index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if found[name].ndim == 3 and name != "rgb":
                    np.save(path.with_suffix(".npy"), found[name])
                else:
                    Image.fromarray(found[name]).save(path)


def _vit(width: int, depth: int, patch: int, side: int) -> dict[str, np.ndarray]:
    """A ViT without a head under timm's names, of random values."""
    rng = np.random.default_rng(0)
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    norms = ["norm", *(f"blocks.{i}.norm{n}" for i in range(depth) for n in (1, 2))]
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in linears.items()}
    state = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    return state | {f"{n}.weight": np.ones(width, np.float32) for n in norms} | {f"{n}.bias": np.zeros(width, np.float32) for n in norms}
