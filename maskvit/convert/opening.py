"""Open a foreign file: find its model among what it holds, with its training arguments, moments and epochs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvit.convert import distillation, fine_tuned, multimae
from maskvit.convert.containers import AVERAGED, LOSSES, find_models, model_names, stand_ins
from maskvit.convert.facts import facts_beside, settings_in
from maskvit.convert.families import family_of
from maskvit.convert.onnx import read_onnx
from maskvit.convert.reader import ConversionError, find_files, read_files, sha256
from maskvit.convert.rules import listed
from maskvit.core.errors import printable

# Of self-distillation's two models: one encoder alone, or both with their heads.
MODELS = ("teacher", "student", "both")
# Names of containers that hold the model itself where others lie beside it.
USUAL = ("model", "state_dict", "module", "net", "network", "model_state_dict", "model_state")
MAX_EPOCHS = 2**31
# Names of files at torch's hub carry the first digits of their SHA-256.
NAMED_DIGEST = re.compile(r".*-([0-9a-f]{8})\.\w+")


class Checkpoint(NamedTuple):
    """A PyTorch file, read.

    Attributes:
      path, digest: the file; of a model in shards the SHA-256 of their SHA-256s.
      content: the file's own keys.
      state: the tensors of its model, or of the one of several that was asked for.
      args: its training arguments, and what the files beside it say.
      adam: moments by tensor name, None where it has none.
      epochs_done: None where it does not say.
      parts: of self-distillation "student", "teacher" and "loss", as far as the file has them.
      said: what was chosen and left out, line by line.
    """

    path: Path
    digest: str
    content: tuple[str, ...]
    state: dict[str, np.ndarray]
    args: dict[str, Any]
    adam: dict[str, Any] | None
    epochs_done: int | None
    parts: dict[str, dict[str, np.ndarray]]
    said: tuple[str, ...] = ()


def open_checkpoint(path: str | Path, model: str = "teacher", allow: Container[str] = ()) -> Checkpoint:
    """Read a file in its public form, its training form, or as a bare state dict; a folder or shards at Hugging Face.

    `model`: which of several models becomes `state`: "teacher" (of a model and its running average: the average), "student" (the
    model itself), "both" (the student), or the place of one in the file. `allow`: names of globals that may be stand-ins.
    """
    path = Path(path)
    files = find_files(path)
    content: Any = read_onnx(files[0]) if _is_onnx(files[0]) else read_files(files, allow)
    models = _named(find_models(content), str(path))
    names = tuple(key for key in content if isinstance(key, str)) if isinstance(content, Mapping) else ()
    if not models:
        holds = f"its keys are {listed(map(repr, names))}" if names else f"it is a {type(content).__name__}"
        raise ConversionError(f"{path}: holds no state dict; {holds}")
    place, said = _chosen(models, model, str(path))
    state = models[place]
    others = [f"{name or 'beside them'} ({len(part)} tensors)" for name, part in models.items() if name != place and _idle(name, part)]
    if others:
        said.append(f"not read: {listed(others)}")
    missed = stand_ins(content)
    if missed:
        said.append(f"left out of the file's bookkeeping: {listed(f'{place} ({name})' for place, name in missed.items())}")
    parts = {name.rpartition(".")[2]: tensors for name, tensors in models.items() if name.rpartition(".")[2] in ("student", "teacher")}
    loss = next((tensors for name, tensors in models.items() if name.rpartition(".")[2] in LOSSES), None)
    if loss is not None:
        parts["loss"] = loss
    args = settings_in(content)
    beside, sources, idle = facts_beside(files[0])
    said += [*idle, *_used(beside, sources, state)]
    adam = None
    if isinstance(content, Mapping) and "optimizer" in content and multimae.is_multimae(state) and not fine_tuned.is_fine_tuned(state):
        if AVERAGED.search(place) and len(models) > 1:
            said.append("the optimizer's moments belong to the model itself, not to its average, and are left out")
        else:
            balancer = content.get("loss_balancer")
            adam = multimae.adam_by_key(content["optimizer"], state, str(path), len(balancer) if isinstance(balancer, Mapping) else 0)
    elif isinstance(content, Mapping) and "optimizer" in content:
        said.append("the optimizer's moments are left out: they come along for MultiMAE's pretraining alone")
    digest = sha256(files[0]) if len(files) == 1 else hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()
    named = NAMED_DIGEST.fullmatch(path.name)
    if named and len(files) == 1 and not digest.startswith(named[1]):
        said.append(
            f"its name says that its SHA-256 begins with {named[1]}, but it begins with {digest[:8]}: a damaged or changed download?"
        )
    keys = ("the state dict itself",) if not place and not any(isinstance(content[name], Mapping) for name in names) else names
    return Checkpoint(path, digest, keys, state, {**beside, **args}, adam, _epochs_done(content, state), parts, tuple(map(printable, said)))


def _is_onnx(path: Path) -> bool:
    """By its suffix, or as PyTorch's exporter begins: the format's version, then who wrote it."""
    with open(path, "rb") as file:
        start = file.read(4)
    return path.suffix == ".onnx" or (start[:1] == b"\x08" and start[2:3] == b"\x12")


def _named(models: dict[str, dict[str, np.ndarray]], where: str) -> dict[str, dict[str, np.ndarray]]:
    """The same. ConversionError for names that would be commands to a terminal."""
    odd = next((name for place, state in models.items() for name in (place, *state) if not name.isprintable()), None)
    if odd is not None:
        raise ConversionError(f"{where}: {odd[:80]!r} is the name of a tensor or a part; it has control characters")
    return models


def _chosen(models: Mapping[str, Mapping[str, np.ndarray]], model: str, where: str) -> tuple[str, list[str]]:
    """(the place of the model that is meant, what is to be said of the choice)."""
    models = {place: state for place, state in models.items() if place.rpartition(".")[2] not in LOSSES}
    last = {place: place.rpartition(".")[2] for place in models}
    if model not in MODELS:
        fits = [model] if model in models else [place for place, name in last.items() if name == model]
        if len(fits) != 1:
            raise ConversionError(
                f"{where}: --model is {model!r}; known: {', '.join(MODELS)}"
                + "".join(f", {place}" for place in models if place and place not in MODELS)
            )
        return fits[0], []
    known = [place for place, state in models.items() if family_of(state)[0] is not None]
    pool = known or [place for place, state in models.items() if family_of(state)[1] != "unknown"]
    pool = pool or [max(models, key=lambda place: len(models[place]))]
    pool = [place for i, place in enumerate(pool) if not any(_equal(models[place], models[other]) for other in pool[:i])]
    pair = {name: place for place, name in last.items() if name in ("student", "teacher")}
    if pair:
        if model != "teacher" and "student" not in pair:
            raise ConversionError(f"{where}: holds a teacher but no student: give --model teacher")
        return pair.get("teacher" if model == "teacher" else "student") or next(iter(pair.values())), []
    if len(pool) == 1:
        return pool[0], []
    averaged = [place for place in pool if AVERAGED.search(place)]
    raw = [place for place in pool if place not in averaged]
    wanted = averaged if model == "teacher" and averaged else raw or averaged
    if len(wanted) > 1:
        wanted = [place for place in wanted if last[place] in USUAL][:1]
    named = [place or "the file itself" for place in pool]
    if not wanted:
        raise ConversionError(f"{where}: holds {len(pool)} models: {listed(named)}; --model NAME says which of them is meant")
    others = " or ".join(f"--model {place or 'student'}" for place in pool if place != wanted[0])
    average = " (running averages of the weights)" if wanted[0] in averaged else ""
    return wanted[0], [
        f"holds {len(pool)} models: {listed(named)}; taken is {wanted[0] or 'the file itself'}{average}; {others} takes another"
    ]


def _idle(place: str, state: Mapping[str, np.ndarray]) -> bool:
    """Whether a state dict is of no model that is known, and of no loss: its tensors are read in no case."""
    return place.rpartition(".")[2] not in LOSSES and family_of(state)[0] is None


def _equal(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    a, b = ({name: part[key] for key, name in model_names(part).items()} for part in (a, b))
    return a.keys() == b.keys() and all(a[key] is b[key] or np.array_equal(a[key], b[key]) for key in a)


def _used(facts: dict[str, Any], sources: list[str], state: Mapping[str, np.ndarray]) -> list[str]:
    """What to say of the files beside the weights. Those of another model are emptied."""
    width = facts.get("hidden_size")
    if type(width) is int and not any(width in value.shape for value in state.values()):
        facts.clear()
        return [f"{', '.join(sources)}: of another model (hidden_size {width}), and not used"]
    return [f"{', '.join(sources)}: used for what the tensors do not show"] if sources else []


def _epochs_done(content: Any, state: Mapping[str, Any]) -> int | None:
    """MultiMAE's, MAE's and CrossMAE's counter names the last epoch, from 0; DINO's and iBOT's the next one."""
    epoch = content.get("epoch") if isinstance(content, Mapping) else None
    if type(epoch) is not int or not 0 <= epoch < MAX_EPOCHS:
        return None
    if family_of(state)[1] in ("MultiMAE", "fine-tuned MultiMAE", "MAE", "CrossMAE"):
        return epoch + 1
    return epoch if distillation.is_distilled(model_names(state).values()) else None
