"""Our checkpoints in the key layouts of others, as `.safetensors`, or as `.pth` where torch is installed.

Sizes are read off the tensors themselves, so that a trained run and a converted file are the same to it.
"""

from __future__ import annotations

import collections
import inspect
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvit import __version__
from maskvit.checkpoints import covering, load_objective_state, load_params, trusting
from maskvit.convert import distillation, fine_tuned, hub, mae, multimae, report, vit
from maskvit.convert.facts import LICENCE, OWN, own_facts
from maskvit.convert.reader import ConversionError
from maskvit.convert.report import Allowed, Row, allow_flags, converted
from maskvit.convert.rules import Rule, listed, nested, path_shapes, to_torch
from maskvit.core.modalities import parse_modalities
from maskvit.core.types import tree_paths
from maskvit.nn.backbone import encoder_sizes
from maskvit.objectives import OBJECTIVES
from maskvit.objectives.stored import class_names

LOG = logging.getLogger("maskvit")

# What belongs to a way of training and to no encoder's file: left out, and listed in the report.
TRAINING_ONLY = (
    (r"projection/.*", "the projection head of self-distillation"),
    (r"inputs/[^/]+/mask_embed", "the token of hidden patches in pretraining"),
)
NO_FINAL_NORM = "the model has no final norm (MultiMAE's encoder has none) and so has the file: in timm, build it with final_norm=False"


class Model(NamedTuple):
    """A model as its tensors show it.

    Attributes:
      config: with the sizes that the rules read.
      params: its tensors.
      decoder: "spatial", "mae" or "crossmae"; empty where there is none.
    """

    config: dict[str, Any]
    params: Mapping[str, Any]
    decoder: str

    @property
    def objective(self) -> dict[str, Any]:
        return self.config["objective"]


def _model(config: Mapping[str, Any], params: Mapping[str, Any]) -> Model:
    given, specs = config["objective"], parse_modalities(config["modalities"])
    first = params["encoder"]["block_00"]
    width = first["norm1"]["scale"].shape[0]
    heads = encoder_sizes(given["encoder"])["heads"] if "encoder" in given else width // 64  # as the defaults have it
    mlp_ratio = first["mlp"]["fc1"]["kernel"].shape[1] / width
    encoder = dict(width=width, depth=len(params["encoder"]), heads=heads, mlp_ratio=mlp_ratio)
    # What --allow has left out of the tensors is no part of the model.
    inputs = tuple(name for name in given.get("inputs", params["inputs"]) if name in params["inputs"])
    undeclared = [name for name in inputs if name not in specs]
    if undeclared:
        raise ValueError(f"config.modalities lacks {undeclared[0]!r}")
    there = [name for name in params.get("outputs", ()) if not name.startswith("error_")]
    outputs = tuple(name for name in given.get("outputs") or there if name in there)
    objective = dict(
        given,
        inputs=inputs,
        outputs=outputs,
        encoder=encoder,
        num_global_tokens=params["global_tokens"].shape[0] if "global_tokens" in params else 0,
        final_norm="norm" in params,
        num_classes=params["head"]["bias"].shape[0] if "head" in params else 0,
        pool=given.get("pool", _default_pool(given.get("name"))),
    )
    decoder = ""
    if outputs:
        tensors = params["outputs"][outputs[0]]
        blocks = [name for name in tensors if name.startswith("block_")]
        mlp, narrow = (tensors if "mlp" in tensors else tensors[blocks[0]])["mlp"], tensors["mask_token"].shape[0]
        objective["decoder"] = dict(given.get("decoder") or {}, width=narrow, depth=len(blocks))
        objective["decoder"]["mlp_ratio"] = mlp["fc1"]["kernel"].shape[1] / narrow
        decoder = "spatial" if "query_norm" in tensors else "crossmae" if "context_norm_00" in tensors else "mae"
    if "projection" in params:
        objective["projection"] = _projection(params["projection"])
    modalities = {name: dict(block) for name, block in config["modalities"].items()}
    if "rgb" in modalities:
        rgb = specs["rgb"]
        modalities["rgb"] |= dict(patch=rgb.patch, channels=rgb.channels, mean=rgb.mean, std=rgb.std, scale=rgb.scale)
    size = config["image_size"]
    described = dict(config, modalities=modalities, objective=objective, image_size=(size, size) if isinstance(size, int) else tuple(size))
    return Model(described, params, decoder)


def _default_pool(objective: Any) -> str:
    """What a classifier reads where the config does not say."""
    constructor = OBJECTIVES.get(objective)
    parameter = inspect.signature(constructor).parameters.get("pool") if constructor else None
    return parameter.default if parameter else "global"


def _projection(tensors: Mapping[str, Any]) -> dict[str, int]:
    hidden, bottleneck = tensors["fc3"]["kernel"].shape
    count = lambda name: tensors[name]["scale"].shape[0] if name in tensors else 0  # noqa: E731
    prototypes = dict(num_prototypes=count("prototypes"), num_patch_prototypes=count("patch_prototypes"))
    return dict(hidden=hidden, bottleneck=bottleneck, **prototypes)


# The layouts: the rules of a model, or ConversionError for one that has no form in it.


def _require(fine: bool, problem: str) -> None:
    if not fine:
        raise ConversionError(problem)


def _require_vit(model: Model) -> None:
    """One continuous input named rgb and at most one global token; other inputs can be left out by name."""
    inputs, count = model.objective["inputs"], model.objective["num_global_tokens"]
    _require("rgb" in inputs, f"has the inputs {', '.join(inputs)}, but no rgb")
    _require(parse_modalities(model.config["modalities"])["rgb"].kind == "continuous", "has class ids for rgb")
    _require(count < 2, f"has {count} global tokens, and a ViT has one class token")


def _is_learned(model: Model) -> bool:
    return "global_pos_embed" in model.params


def _vit(model: Model, names: vit.Names) -> list[Rule]:
    _require_vit(model)
    with_token = model.objective["num_global_tokens"] == 1
    return vit.rules(model.config, vit.Form(names, with_token, with_token), _is_learned(model))


def _timm(model: Model) -> list[Rule]:
    of_all = model.objective["pool"] == "all" and "head" in model.params
    _require(not of_all, "classifies the mean of all tokens, and timm that of the patches")
    return _vit(model, vit.TIMM)


def _hugging_face(model: Model) -> list[Rule]:
    _require(model.objective["num_global_tokens"] == 1, "has not one global token, and a ViT at Hugging Face has one class token")
    _require(model.objective["final_norm"], "has no final norm (MultiMAE's encoder has none), and a ViT at Hugging Face always has one")
    pools = "classifies the mean of its tokens, and a ViT at Hugging Face its class token (--to timm has both)"
    _require(model.objective["pool"] == "global", pools)
    height, width = model.config["image_size"]
    square = "and a MAE at Hugging Face of square ones (--allow 'outputs/.*' writes the encoder alone)"
    _require(height == width or model.decoder != "mae", f"is of pictures of {height} x {width}, {square}")
    return _mae(model, vit.HUGGING_FACE) if model.decoder == "mae" else _vit(model, vit.HUGGING_FACE)


def _mae(model: Model, names: vit.Names = vit.TIMM) -> list[Rule]:
    _require(model.decoder == "mae", "has no decoder of MAE's (--to timm writes its encoder alone)")
    _require(model.objective["final_norm"], "has no final norm, and a MAE has one")
    _require(len(model.objective["outputs"]) == 1, f"has the outputs {', '.join(model.objective['outputs'])}, and a MAE has one")
    _require(model.objective["num_global_tokens"] == 1, "has not one global token, and a MAE has one class token")
    _require_vit(model)
    return mae.rules(model.config, names)


def _crossmae(model: Model) -> list[Rule]:
    _require(model.decoder == "crossmae", "has no decoder of CrossMAE's")
    _require(len(model.objective["outputs"]) == 1, f"has the outputs {', '.join(model.objective['outputs'])}, and a CrossMAE has one")
    _require(model.objective["num_global_tokens"] == 1, "has not one global token, and a CrossMAE has one class token")
    _require_vit(model)
    tensors = model.params["outputs"][model.objective["outputs"][0]]
    features = tensors["feature_weights"].shape[1] if "feature_weights" in tensors else 0
    return mae.cross_rules(model.config, mae.Crossing(features, "self_attn" in tensors["block_00"]))


def _multimae(model: Model) -> list[Rule]:
    """With other decoders, or none: MultiViT, the encoder alone; fine-tuned, with its head."""
    _require(model.objective["num_global_tokens"] > 0, "has no global token, and MultiMAE has one")
    if "task" in model.objective and fine_tuned.head_of(model.objective) in model.params:
        return fine_tuned.writing_rules(model.config, model.params)
    if model.decoder == "spatial":
        return multimae.rules(model.config)
    return multimae.rules({**model.config, "objective": {**model.objective, "outputs": (), "decoder": multimae.DECODER}})


def _distilled(model: Model) -> list[Rule]:
    _require("projection" in model.params, "has no projection head of DINO's or iBOT's")
    return distillation.rules(model.config)


LAYOUTS: dict[str, Callable[[Model], list[Rule]]] = {
    "multimae": _multimae,
    "timm": _timm,
    "huggingface": _hugging_face,
    "mae": _mae,
    "crossmae": _crossmae,
    "dino": _distilled,
    "ibot": _distilled,
}

FOLDERS = ("timm", "huggingface")  # the layouts whose libraries load a folder


# Writing


def export(src: str | Path, dst: str | Path, layout: str = "multimae", *, allow: Sequence[str] = (), model: str = "teacher") -> None:
    """Write one of our checkpoints in a key layout of `LAYOUTS`: `.safetensors`, or `.pth` where torch is installed.

    For timm and Hugging Face `dst` may be a folder, a new or empty one, which their libraries load as it is: the weights as
    model.safetensors, config files, and a model card.
    `allow`: regular expressions of our paths that the layout has no place for and that may be left out. `model`: of a
    checkpoint of DINO or iBOT the "teacher" or the "student"; their own layouts hold both. What became of every tensor is
    written beside `dst`; for Hugging Face a config.json too.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"--to is {layout!r}; known: {', '.join(LAYOUTS)}")
    folder, dst = _place(Path(dst), layout)
    allowed = Allowed(allow)
    params, metadata = load_params(src)
    config = metadata.get("config", {})
    if "objective" not in config:
        raise ConversionError(f"{src}: is a classifier, which has no layout to be written in")
    said: list[str] = []
    both = layout in ("dino", "ibot")
    state = load_objective_state(src) if "projection" in params else {}
    with trusting(src):
        name = config["objective"]["name"]
    if both and name != layout:
        raise ConversionError(f"{src}: is of the objective {name!r}, which has no form in the layout {layout!r}")
    if "teacher" in state and model == "teacher" and not both:
        params = state["teacher"]
        said.append("this is the teacher; --model student writes the other")
    if layout == "multimae" and "global_pos_embed" in params:
        params = _with_fixed_positions(params)
        said.append("learned positions written as MultiMAE's fixed table; the class token's is added to the global token")
    flat = tree_paths(params)
    allowed.check_use(flat, str(src))
    with trusting(src):
        of = _model(config, nested({path: value for path, value in flat.items() if path not in allowed}))
    try:
        rules = LAYOUTS[layout](of)
    except ConversionError as error:
        raise ConversionError(f"{src}: {error}: no form in the layout {layout!r}") from error
    except KeyError as error:
        raise ConversionError(f"{src}: --allow leaves out {error}, without which there is no model to write") from error
    kept, rows = _kept(flat, rules, layout, allowed, str(src))
    tensors = to_torch(rules, kept, str(src))
    names = _names(layout, of, tensors)
    rows = [converted(rule, names, backwards=True) for rule in rules] + rows
    tensors = {names.get(key, key): value for key, value in tensors.items()}
    if both:
        tensors, rows = _both(tensors, rows, of, state, str(src))
    if layout == "timm" and not of.objective["final_norm"]:
        said.append(NO_FINAL_NORM)
    dst.parent.mkdir(parents=True, exist_ok=True)
    files = _files_beside(of, layout, metadata, tensors, folder)
    if "config.json" in files and (dst.parent / "config.json").exists():
        raise ConversionError(f"{dst.parent / 'config.json'}: is there already; write to a folder of its own")
    licence = metadata.get("licence")
    _write(dst, tensors, own_facts(of.config) | ({LICENCE: str(licence)} if licence else {}))
    for name, text in files.items():
        (dst.parent / name).write_text(text, encoding="utf-8")
    listed_in = dst.with_name(report.FILE if folder else f"{dst.name}.{report.FILE}")
    report.write(listed_in, f"{src}, in the layout {layout}, to {dst}", rows, said)
    for line in said:
        LOG.info("%s: %s", src, line)
    LOG.info("%s: in the layout %s written to %s; %s", src, layout, dst, report.summary(rows))


def _place(dst: Path, layout: str) -> tuple[Path | None, Path]:
    """(the folder that others load as it is, or None; the file of weights). Raises ConversionError where nothing is to be written there."""
    if dst.suffix in (".safetensors", ".pth") and not dst.is_dir():
        return None, dst
    if layout not in FOLDERS:
        raise ConversionError(f"{dst}: name it .safetensors or .pth; a folder is written for {' and '.join(FOLDERS)}")
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise ConversionError(f"{dst}: is there already; give a new folder, or name the file .safetensors or .pth")
    return dst, dst / hub.WEIGHTS


def _files_beside(
    model: Model, layout: str, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray], folder: Path | None
) -> dict[str, str]:
    """{name: text} of what is written beside the weights."""
    names, found = class_names(metadata, model.objective["num_classes"]), {}
    if layout == "huggingface":
        found["config.json"] = hub.hugging_face_config(model.config, model.decoder, names)
        found["preprocessor_config.json"] = hub.hugging_face_preprocessing(model.config)
    elif layout == "timm" and folder is not None:
        found["config.json"] = hub.timm_config(model.config, names, metadata.get("licence"))
    files = {name: json.dumps(content, indent=2) + "\n" for name, content in found.items()}
    if folder is not None:
        count = hub.parameter_count(tensors)
        files["README.md"] = hub.model_card(layout, folder.resolve().name, model.config, model.decoder, metadata, count, __version__)
    return files


def _with_fixed_positions(params: Mapping[str, Any]) -> dict[str, Any]:
    """Learned positions joined as a plain encoder has them."""
    inputs = {
        name: {"pos_embed" if key == "learned_pos_embed" else key: value for key, value in block.items()}
        for name, block in params["inputs"].items()
    }
    rest = {key: value for key, value in params.items() if key != "global_pos_embed"}
    return {**rest, "inputs": inputs, "global_tokens": params["global_tokens"] + params["global_pos_embed"]}


def _kept(flat: Mapping[str, Any], rules: Sequence[Rule], layout: str, allowed: Allowed, where: str) -> tuple[dict[str, Any], list[Row]]:
    """The parameters that the rules name, and the rows of the others; ConversionError for others that are not allowed."""
    places = path_shapes(rules)
    rows, surplus = [], []
    for path in flat.keys() - places.keys():
        why = next((why for pattern, why in TRAINING_ONLY if re.fullmatch(pattern, path)), "allowed" if path in allowed else "")
        if why:
            rows.append(Row("left out", ((path, tuple(flat[path].shape)),), (), why))
        else:
            surplus.append(path)
    if surplus:
        norm = "; MultiMAE has no final norm" if layout == "multimae" and any(path.startswith("norm/") for path in surplus) else ""
        remedy = allow_flags(covering(surplus, flat))
        raise ConversionError(
            f"{where}: {len(surplus)} tensors have no place in the layout {layout!r}: {listed(surplus)}{norm}; {remedy} leaves them out"
        )
    return nested({path: value for path, value in flat.items() if path in places}), sorted(rows)


def _names(layout: str, model: Model, keys: Mapping[str, Any]) -> dict[str, str]:
    """What stands before the rules' keys: both models' own names; the encoder's of Hugging Face's models with something behind it."""
    if layout in ("dino", "ibot"):
        return {key: f"student.module.{_wrapped(key)}" for key in keys}
    if layout != "huggingface" or not (model.decoder or model.objective["num_classes"]):
        return {}
    return {key: f"vit.{key}" for key in keys if not key.startswith(("decoder.", "classifier."))}


def _wrapped(key: str) -> str:
    return key if key.startswith("head.") else f"backbone.{key}"


def _both(
    student: Mapping[str, np.ndarray], rows: Sequence[Row], model: Model, state: Mapping[str, Any], where: str
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """The student's tensors with the teacher's and the loss's centers, each under its own name, and the rows of all."""
    if not state:
        raise ConversionError(f"{where}: holds no teacher: it was not trained or imported with both models")
    name = model.objective["name"]
    teacher_rules, center_rules = distillation.rules(model.config, teacher=True), distillation.center_rules(model.config)
    teacher = to_torch(teacher_rules, state["teacher"], f"{where} (teacher)")
    centers = to_torch(center_rules, {key: value for key, value in state.items() if key != "teacher"}, f"{where} (centers)")
    names = {key: f"teacher.{_wrapped(key)}" for key in teacher} | {key: f"{name}_loss.{key}" for key in centers}
    more = [converted(rule, names, "objective_state/teacher/", backwards=True) for rule in teacher_rules]
    more += [converted(rule, names, "objective_state/", backwards=True) for rule in center_rules]
    return {**student, **{names[key]: value for key, value in (teacher | centers).items()}}, [*rows, *more]


def _write(dst: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """`facts`: what the tensors do not show (`own_facts`), written beside them so that the file comes back as it went."""
    if dst.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()},
            str(dst),
            metadata={"format": "pt", OWN: json.dumps(facts)},
        )
        return
    try:
        import torch
    except ImportError as error:
        raise ConversionError(f"{dst}: writing .pth needs torch; write .safetensors instead, or install torch") from error
    parts: dict[str, Any] = {}
    for key, value in tensors.items():
        start, _, name = key.partition(".")
        in_part = start in ("student", "teacher") or start.endswith("_loss")
        part = parts.setdefault(start if in_part else "model", collections.OrderedDict())
        part[name if in_part else key] = torch.from_numpy(np.array(value))
    torch.save({**parts, OWN: dict(facts)}, dst)
