"""Checkpoints in and out; torch itself is not needed but for writing .pth and for --verify.

Read are .pth, .safetensors, folders and shards of Hugging Face, and ViTs exported to ONNX:

  MultiMAE           its pretraining files, with optimizer; MultiViT, its encoder alone, with --allow 'outputs/.*' (fresh decoders)
                     fine-tuned ones with their head: classes of pictures (linear), or of pixels, or depth (ConvNeXt, DPT, Segmenter)
  MAE, CrossMAE      with their decoders; Hugging Face's ViTMAEForPreTraining. --target says raw or normalized where the file does not;
                     MAE's encoder alone, with --target and --allow 'outputs/.*' (a fresh decoder)
  plain ViTs         timm (with or without class token, LayerScale), MAE's encoder and its fine-tuned forms, DINO, DINOv2, iBOT and
                     AttMask (backbones, or one of two models), Hugging Face's ViTModel, ViTMAEModel, ViTForImageClassification, Dinov2Model
  DINO, iBOT         --model both keeps student, teacher, their heads and the loss's centers, to train on
  ResNets            torchvision's keys, for Grad-CAM

What shapes do not show (heads, a grid that is not square, mean and deviation of the input) is read where the file or the config files
beside it say it; else the usual is assumed, which is printed with the flag that changes it.

Written (--to) are the key layouts of MultiMAE, also fine-tuned or without decoders (multimae), timm, Hugging Face with its config.json
(huggingface), MAE, CrossMAE, DINO and iBOT; for timm and Hugging Face also a folder that their libraries load, with a model card. What
became of every tensor is written beside the result; what is missing or left over is an error unless --allow names it.

python convert_torch_checkpoint.py --src multimae.pth --dst checkpoints/multimae_b     # then config.init_from.path
python convert_torch_checkpoint.py --src mae_pretrain_vit_base_full.pth --target normalized --dst checkpoints/mae_b
python convert_torch_checkpoint.py --src dino_deitsmall16_pretrain.pth --dst checkpoints/dino_s    # guidance from another model
python convert_torch_checkpoint.py --src multimae.pth --inspect
python convert_torch_checkpoint.py --src runs/x --dst x.safetensors --to multimae
python convert_torch_checkpoint.py --src runs/mae --dst vit.safetensors --to timm --allow 'outputs/.*'    # the encoder alone
python convert_torch_checkpoint.py --src runs/x --dst x_hf --to huggingface    # a folder for from_pretrained
python convert_torch_checkpoint.py --src multimae.pth --verify ~/MultiMAE [--images DIR]
"""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from maskvit.core.errors import add_debug, all_mistakes, printable, run_command
from maskvit.core.shipped import find

LAYOUTS = ("multimae", "timm", "huggingface", "mae", "crossmae", "dino", "ibot")
FOLDERS = ("timm", "huggingface")
MODELS = ("teacher", "student", "both")
TARGETS = ("normalized", "raw")
# What belongs to reading a foreign file, and means nothing where one of ours is written.
READING = ("target", "num_heads", "decoder_num_heads", "grid", "mean", "std", "scale", "inspect", "verify")


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}\n")


def parser() -> Parser:
    """The command's flags. Values are checked together in `checked`, so that all mistakes are told at once."""
    found = Parser(prog="python -m maskvit convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--src", required=True, help="a .pth, .safetensors or .onnx file, or a folder; with --to, a checkpoint of ours")
    found.add_argument("--dst", help="where to write")
    found.add_argument("--to", metavar="LAYOUT", help=f"write a checkpoint of ours in this key layout: {', '.join(LAYOUTS)}")
    found.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="REGEX",
        help="keys or paths that may be left out or stay at their initialization, and classes in a .pth that stand-ins may take the "
        "place of; may be given several times",
    )
    found.add_argument(
        "--model",
        metavar="NAME",
        default="teacher",
        help="which of several models in a file: teacher (also: the running average), student (also: the model itself), both, or the "
        "name of one as it is printed (default: teacher)",
    )
    found.add_argument("--target", metavar="KIND", help="what a masked autoencoder predicts where the file does not say: normalized or raw")
    found.add_argument("--inspect", action="store_true", help="print what the file is")
    found.add_argument("--verify", metavar="DIR", help="compare with a checkout of the PyTorch reference, also with inputs left out")
    found.add_argument("--images", metavar="DIR", help="pictures for --verify; random ones otherwise")
    found.add_argument("--num-heads", metavar="N", help="heads of the encoder, where the file does not say")
    found.add_argument("--decoder-num-heads", metavar="N", help="heads of the decoders, where the file does not say")
    found.add_argument("--grid", metavar="ROWSxCOLUMNS", help="rows and columns of a plain ViT's position table, where it is not square")
    found.add_argument("--mean", metavar="X,Y,Z", help="mean of the input after --scale, one value per channel or one for all")
    found.add_argument("--std", metavar="X,Y,Z", help="deviation of the input after --scale, likewise")
    found.add_argument("--scale", metavar="X", help="factor on stored values before mean and deviation, such as 1/255")
    add_debug(found)
    return found


def _heads(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not int(text):
        raise ValueError("give a positive whole number")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch("([1-9][0-9]{0,3})[xX,]([1-9][0-9]{0,3})", text)
    if not match:
        raise ValueError("give rows and columns, such as 14x28")
    return int(match[1]), int(match[2])


def _number(text: str) -> float:
    match = re.fullmatch(r"([-+0-9.eE]+)(?:/([0-9.]+))?", text.strip())
    try:
        value = float(match[1]) / float(match[2] or 1) if match else float("nan")
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not abs(value) < 1e6:
        raise ValueError("give numbers such as 0.5 or 1/255, with commas between them")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _positive(text: str) -> tuple[float, ...]:
    values = _numbers(text)
    if min(values) <= 0:
        raise ValueError("must be above 0")
    return values


def _scale(text: str) -> float:
    (value,) = _positive(text) if "," not in text else (-1.0,)
    if value <= 0:
        raise ValueError("give one number above 0, such as 1/255")
    return value


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return text


def _one_of(*known: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"known: {', '.join(known)}")
        return text

    return check


def checked(flags: argparse.Namespace) -> dict[str, Any]:
    """The values of all flags. Raises Mistakes with every flag that is wrong or would be without effect."""
    values = {name: value for name, value in vars(flags).items() if name != "debug"}
    checks: dict[str, Callable[[str], Any]] = dict(
        to=_one_of(*LAYOUTS), target=_one_of(*TARGETS), num_heads=_heads, decoder_num_heads=_heads, grid=_grid, mean=_numbers,
        std=_positive, scale=_scale,
    )  # fmt: skip
    with all_mistakes() as mistakes:
        for name, check in checks.items():
            with mistakes.check():
                if values[name] is not None:
                    try:
                        values[name] = check(values[name])
                    except ValueError as error:
                        raise ValueError(f"--{name.replace('_', '-')} is {values[name]!r}; {error}") from error
        for pattern in values["allow"]:
            with mistakes.check():
                try:
                    _regex(pattern)
                except ValueError as error:
                    raise ValueError(f"--allow '{pattern}' {error}") from error
        for wrong, message in _without_effect(values):
            with mistakes.check():
                if wrong:
                    raise ValueError(message)
    return values


def _without_effect(values: dict[str, Any]) -> list[tuple[bool, str]]:
    src, dst = Path(values["src"]), values["dst"]
    idle = [f"--{name.replace('_', '-')}" for name in READING if values["to"] and values[name]]
    return [
        (not (values["inspect"] or values["verify"] or dst), "nothing to do: give --dst, --inspect or --verify"),
        (not src.exists(), f"--src {src}: no such file or folder"),
        (bool(values["to"]) and not dst, "--to needs --dst, the file or folder to write"),
        (bool(idle), f"{', '.join(idle)}: for reading a foreign file; --to writes a checkpoint of ours"),
        (bool(values["images"]) and not values["verify"], "--images is for --verify"),
        (bool(values["images"]) and not Path(values["images"] or ".").is_dir(), f"--images {values['images']}: no such folder"),
        (bool(values["verify"]) and bool(dst), "--verify compares and writes nothing: leave --dst out"),
        (bool(values["verify"]) and not Path(values["verify"] or ".").is_dir(), f"--verify {values['verify']}: no such folder"),
        (
            bool(values["to"]) and values["to"] not in FOLDERS and bool(dst) and Path(dst).suffix not in (".safetensors", ".pth"),
            f"--dst {dst}: name it .safetensors or .pth; a folder is written for {' and '.join(FOLDERS)}",
        ),
        (not values["to"] and bool(dst) and Path(dst).is_file(), f"--dst {dst}: is a file; a checkpoint of ours is a folder"),
    ]


def run(flags: argparse.Namespace) -> int:
    """Do what the flags say."""
    flags.src = str(find(flags.src))  # assets/multimae_scenes.pth came with the package
    values = checked(flags)
    from maskvit import convert

    src, dst = values["src"], values["dst"]
    choices = dict(allow=values["allow"], model=values["model"])
    if values["to"]:
        convert.export(src, dst, values["to"], **choices)
        return 0
    heads = values["num_heads"], values["decoder_num_heads"]
    rgb = {name: values[name] for name in ("mean", "std", "scale") if values[name] is not None}
    reading = dict(target=values["target"], grid=values["grid"], rgb=rgb, **choices)
    if values["inspect"]:
        print(printable(convert.inspect(src, *heads, **reading)))
    if values["verify"]:
        from maskvit.convert.verify import verify
        from maskvit.objectives import build_objective

        return 0 if verify(src, values["verify"], build_objective, values["images"], *heads, allow=values["allow"]) else 1
    if dst:
        convert.convert(src, dst, *heads, **reading)
    return 0


class Printable(logging.Formatter):
    """Names out of files reach a terminal as text, not as commands to it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be done, 1 where --verify finds a difference."""
    flags = parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return run_command(lambda: run(flags), flags.debug)
