"""Where a file keeps its model: wrappers' names in its keys, containers around its state dicts, and several models in one file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from maskvit.convert.stand_ins import Inert

# What data parallelism, compilation, sharding and checkpointing put into keys, anywhere and any number of times.
WRAPPERS = frozenset(
    [
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_forward_module", "_checkpoint_wrapped_module"),
        *("_ddp_module", "_wrapped_module", "_original_module"),
    ]
)
# One tensor of each kind of model; what stands before its name belongs to whatever the model is a part of.
ANCHORS = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight", "global_tokens", "layer1.0.conv1.weight")
RENAMED = (
    # DINOv2 trains its blocks in chunks and counts through: blocks.<chunk>.<block>.
    (re.compile(r"(^|\.)blocks\.\d+\.(\d+)\."), r"\1blocks.\2."),
    # transformers 5 writes a decoder's blocks under this name, which none of its versions reads in other files.
    (re.compile(r"(^|\.)decoder\.decoder_encoder\.layer\."), r"\1decoder.decoder_layers."),
    # Weight normalization of torch 2: scale and direction.
    (re.compile(r"\.parametrizations\.weight\.original0$"), ".weight_g"),
    (re.compile(r"\.parametrizations\.weight\.original1$"), ".weight_v"),
)
LOSSES = ("ibot_loss", "dino_loss")
# Names of containers that hold no model.
NO_MODEL = re.compile(r"optim|sched|scaler|\bamp\b|balancer|grad|(^|_)loss", re.IGNORECASE)
# Names of running averages of a model's weights.
AVERAGED = re.compile(r"(^|[._])(ema|avg|averaged?|swa|shadow|teacher)([._]|$)", re.IGNORECASE)
MAX_DEPTH = 4
MAX_CONTAINERS = 4096


def model_names(keys: Iterable[str]) -> dict[str, str]:
    """{key: what the model itself calls it}: without wrappers, and without the name of what the model is a part of."""
    names = _unwrapped(keys)
    (prefix, *others) = _prefixes(names.values()) or [""]
    return names if others else {key: _relative(name, prefix) for key, name in names.items()}


def _unwrapped(keys: Iterable[str]) -> dict[str, str]:
    names = {}
    for key in keys:
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS) if not WRAPPERS.isdisjoint(key.split(".")) else key
        for pattern, replacement in RENAMED:
            name = pattern.sub(replacement, name)
        names[key] = name
    return names


def _prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of `ANCHORS`, each once."""
    found: dict[str, None] = {}
    for name in names:
        for anchor in ANCHORS:
            if name == anchor or name.endswith(f".{anchor}"):
                found[name.removesuffix(anchor)] = None
    return list(found)


def _relative(name: str, prefix: str) -> str:
    """`name` without as much of `prefix` as it begins with, whole parts only."""
    parts, before = name.split("."), prefix.split(".")[:-1]
    count = 0
    while count < min(len(before), len(parts) - 1) and parts[count] == before[count]:
        count += 1
    return ".".join(parts[count:])


def _roots(prefixes: list[str]) -> dict[str, str]:
    """{the name of a model of several: what its keys begin with}."""
    split = [prefix.split(".")[:-1] for prefix in prefixes]
    shared = 0
    while all(len(parts) > shared for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    roots = {}
    for parts in split:
        root = parts[: shared + 1]
        roots[root[-1] if root else ""] = "".join(f"{part}." for part in root)
    return roots


def models_of(state: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The models in one flat state dict by what their keys begin with; {"": the whole} where it holds one or none that is known.

    The centers of a loss come under the loss's name. Where there are several, keys lose what they begin with.
    """
    names = _unwrapped(state)
    prefixes = _prefixes(names.values())
    losses = [name for name in LOSSES if any(other.startswith(f"{name}.") for other in names.values())]
    roots = _roots(prefixes) if len(prefixes) > 1 else {}
    if not roots and losses and prefixes and prefixes[0].startswith(("student.", "teacher.")):
        first = prefixes[0].split(".")[0]
        roots = {first: f"{first}."}
    if len(roots) < 1:
        return {"": dict(state)}
    roots |= {name: f"{name}." for name in losses}
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in roots}
    longest = sorted(roots.items(), key=lambda item: -len(item[1]))
    for key, name in names.items():
        for model, root in longest:
            if name.startswith(root):
                found[model][key.removeprefix(root)] = state[key]
                break
        else:
            found.setdefault("", {})[key] = state[key]  # beside the models
    return {name: tensors for name, tensors in found.items() if tensors}


def tensors_of(part: Any) -> dict[str, np.ndarray]:
    """The tensors that lie in a mapping under string keys, without what lies beside them; of a pickled module its state dict."""
    if isinstance(part, Inert):
        return module_tensors(part)
    if not isinstance(part, Mapping):
        return {}
    return {key: value for key, value in part.items() if isinstance(key, str) and isinstance(value, np.ndarray)}


def module_tensors(module: Inert) -> dict[str, np.ndarray]:
    """The parameters and buffers in the stand-in for a `torch.nn.Module` that was pickled whole, by their names in its state dict."""
    found: dict[str, np.ndarray] = {}
    level, seen = [("", module)], set[int]()
    while level:
        prefix, part = level.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        for name in ("_parameters", "_buffers"):
            found |= {f"{prefix}{key}": value for key, value in tensors_of(part.facts.get(name)).items()}
        inside = part.facts.get("_modules")
        below = inside.items() if isinstance(inside, Mapping) else ()
        level += [(f"{prefix}{key}.", value) for key, value in below if isinstance(key, str) and isinstance(value, Inert)]
    return found


def find_models(content: Any) -> dict[str, dict[str, np.ndarray]]:
    """Every state dict in a file by its place ("model", "ema.state_dict"; "" for the file itself), losses' tensors among them."""
    found: dict[str, dict[str, np.ndarray]] = {}
    level, visited = [("", content)], 0
    for _ in range(MAX_DEPTH):
        below = []
        for place, part in level:
            visited += 1
            if visited > MAX_CONTAINERS:
                return found
            state = tensors_of(part)
            for name, tensors in models_of(state).items() if state else ():
                found[".".join(filter(None, (place, name)))] = tensors
            entries = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, (list, tuple)) else ()
            below += [
                (f"{place}.{key}" if place else str(key), value)
                for key, value in entries
                if isinstance(value, (Mapping, list, tuple, Inert)) and (str(key) in LOSSES or not NO_MODEL.search(str(key)))
            ]
        level = below
    return found


def stand_ins(content: Any) -> dict[str, str]:
    """{place: class} of what was not read, as far as it lies in plain containers and in argparse's Namespace."""
    found: dict[str, str] = {}
    seen: set[int] = set()
    level = [("", content)]
    while level and len(seen) < MAX_CONTAINERS:
        place, part = level.pop(0)
        entries: Iterable[Any] = ()
        if isinstance(part, Inert) and part.name not in ("argparse.Namespace", "types.SimpleNamespace"):
            found[place] = part.name
        elif id(part) not in seen:
            seen.add(id(part))
            inside = part.facts if isinstance(part, Inert) else part
            entries = inside.items() if isinstance(inside, Mapping) else enumerate(inside) if isinstance(inside, (list, tuple)) else ()
        level += [(f"{place}.{k}" if place else str(k), v) for k, v in entries if isinstance(v, (Mapping, list, tuple, Inert))]
    return found
