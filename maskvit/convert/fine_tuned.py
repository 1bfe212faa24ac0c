"""Fine-tuned MultiMAE files: the encoder with its input adapters, and one `output_adapters.TASK` that is a head and no decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskvit.convert import multimae
from maskvit.convert.facts import DECLARED
from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, layer_norm, linear
from maskvit.convert.source import Hints, Source
from maskvit.convert.task_heads import LAYOUTS, UNUSED, WHY_UNUSED, TaskHead, own_head_rules, task_head
from maskvit.heads import HEADS

# A key of a head that no decoder has; the first is that of the classifier of whole pictures.
CLASSIFIER = "head.weight"
_OWN = (CLASSIFIER, *(layout.own for layout in LAYOUTS.values()))
HEAD = re.compile("|".join(rf"output_adapters\.([^.]+)\.{re.escape(own)}" for own in _OWN))
LEFT_OUT = ((rf"output_adapters\.[^.]+\.{re.escape(UNUSED)}.*", WHY_UNUSED),)
# Depth as the reference's own script makes its targets, taken for millimeters: with this mean and deviation, in meters.
DEPTH = dict(scale=1 / 1000, mean=(2.0707764,), std=(0.7775723,), metres_per_count=1 / 1000)


def is_fine_tuned(keys: Any) -> bool:
    """Whether these are the keys of a MultiMAE with the head of a downstream task."""
    return multimae.is_multivit(keys) and any(HEAD.fullmatch(key) for key in keys)


def _task(source: Source) -> str:
    """The name of the only task in a file."""
    tasks = list(dict.fromkeys(key.split(".")[1] for key in source.tensors if key.startswith("output_adapters.")))
    if len(tasks) != 1:
        raise ConversionError(
            f"{source.where}: has heads or decoders of {', '.join(tasks) or 'no task'}, and a fine-tuned model has one; --allow "
            f"'output_adapters\\.{tasks[-1] if tasks else 'NAME'}\\..*' leaves one out"
        )
    return tasks[0]


def infer_config(source: Source, hints: Hints) -> dict[str, Any]:
    """The config of the model in a file, with the objective "supervised"."""
    inputs, image_size, modalities = multimae.read_inputs(source, hints)
    encoder, task = multimae.read_encoder(source, hints), _task(source)
    objective: dict[str, Any] = dict(
        name="supervised", inputs=tuple(inputs), encoder=encoder, num_global_tokens=source.shape("global_tokens", 3)[1]
    )
    if f"output_adapters.{task}.{CLASSIFIER}" in source.tensors:
        classes = source.shape(f"output_adapters.{task}.{CLASSIFIER}", 2)[0]
        pool = "global" if hints.args.get("use_mean_pooling") is False else "all"
        objective |= dict(task=dict(name="classification", num_classes=classes), head=dict(name="linear"), pool=pool)
        return dict(image_size=image_size, modalities=modalities, objective=objective)
    head = task_head(source, task, hints)
    HEADS[head.name].layers(encoder["depth"])  # an error where there are too few blocks for it to read
    read_from = _read_from(head, inputs, encoder["width"], hints, source.where)
    target = task if task not in inputs else f"{task}_target"
    if not re.fullmatch(r"\w[\w-]*", target):
        raise ConversionError(f"{source.where}: the task is named {task!r}; letters, digits, - and _ only")
    if target != task:
        hints.said.append(f"{task!r} is also an input: what the model answers is called {target!r}")
    fields = _target(head, target, task, hints, source.where)
    modalities = {**modalities, target: dict(fields, patch=modalities[read_from[0]]["patch"], stride=1)}
    name = "segmentation" if fields["kind"] == "categorical" else "regression"
    objective |= dict(task=dict(name=name, target=target), head=dict(name=head.name, **head.options), read_from=read_from)
    return dict(image_size=image_size, modalities=modalities, objective=objective)


def _read_from(head: TaskHead, inputs: list[str], width: int, hints: Hints, where: str) -> tuple[str, ...]:
    """The inputs whose tokens the head reads: what the training arguments say, else rgb, or as many as it is wide."""
    count, stated = head.width // width, hints.args.get("decoder_main_tasks")
    named = tuple(stated.split("-")) if isinstance(stated, str) else tuple(stated) if isinstance(stated, (list, tuple)) else ()
    if head.width == len(named) * width and all(name in inputs for name in named):
        return named
    if head.width != count * width or count not in (1, len(inputs)):
        raise ConversionError(f"{where}: the head reads {head.width} channels, but the tokens of {', '.join(inputs)} have {width} each")
    found = tuple(inputs) if count == len(inputs) else ("rgb",) if "rgb" in inputs else (inputs[0],)
    if len(inputs) > 1:
        hints.said.append(f"assumed: the head reads the tokens of {', '.join(found)}")
    return found


def _target(head: TaskHead, target: str, task: str, hints: Hints, where: str) -> dict[str, Any]:
    """The modality that the head answers, without its patch: as the file notes it, else classes, or numbers where a head is made for them
    or has one channel."""
    noted = hints.args.get(DECLARED)
    of_classes = isinstance(noted, Mapping) and isinstance(noted.get(target), Mapping) and noted[target].get("kind") == "categorical"
    if found := hints.declared(target, {"num_classes" if of_classes else "channels": head.channels}, where):
        return {key: value for key, value in found.items() if key not in ("patch", "stride")}
    if dict(head.options).get("form") != "regression" and head.channels > 1:
        return dict(kind="categorical", num_classes=head.channels, loss="cross_entropy", missing=255)
    fields: dict[str, Any] = dict(kind="continuous", channels=head.channels, loss="l1")
    if task == "depth" and head.channels == 1:
        hints.said.append("assumed: depth in millimeters less 2070.7764, over 777.5723, as MultiMAE's script for NYUv2 trains it")
        return fields | DEPTH
    hints.said.append(f"assumed: values of {task!r} are answered as the head gives them")
    return fields


def _classifier_rules(task: str, width: int, classes: int) -> list[Rule]:
    return layer_norm(f"output_adapters.{task}.norm", "norm", width) + linear(f"output_adapters.{task}.head", "head", width, classes)


def head_of(objective: Mapping[str, Any]) -> str:
    """Where the parameters of a fine-tuned model's head stand."""
    name: str = objective.get("head", {}).get("name", "linear")
    return "head" if name == "linear" and objective["task"]["name"] == "classification" else name


def writing_rules(config: Mapping[str, Any], params: Mapping[str, Any]) -> list[Rule]:
    """Every tensor of a fine-tuned model of ours. Raises ConversionError, saying what it has, for one that is no model of MultiMAE's."""
    objective = config["objective"]
    found, width = multimae.rules(dict(config, objective=dict(objective, outputs=()))), objective["encoder"]["width"]
    if objective["task"]["name"] == "classification":
        pool = objective["pool"]
        if head_of(objective) != "head":
            raise ConversionError(f"has the head {head_of(objective)!r}, and MultiMAE classifies with a linear one")
        if pool not in ("all", "global"):
            raise ConversionError(f"classifies by pool = {pool!r}, and MultiMAE by the mean of all tokens or by the global one")
        return found + _classifier_rules("cls", width, objective["num_classes"])
    name, target = head_of(objective), objective["task"]["target"]
    if name not in LAYOUTS:
        raise ConversionError(f"has the head {name!r}, and for pixels MultiMAE has {', '.join(LAYOUTS)}")
    depth, layers = objective["encoder"]["depth"], tuple(objective.get("layers") or ())
    if layers and layers != HEADS[name].layers(depth):
        raise ConversionError(f"has a head that reads the blocks {layers}, and MultiMAE's reads {HEADS[name].layers(depth)}")
    task = target.removesuffix("_target") if target.removesuffix("_target") in objective["inputs"] else target
    return found + own_head_rules(task, name, params[name])


def rules(source: Source, config: Mapping[str, Any]) -> list[Rule]:
    """Every tensor of the model in a file, whose config that is."""
    objective, task = config["objective"], _task(source)
    found, width = multimae.rules(dict(config, objective=dict(objective, outputs=()))), objective["encoder"]["width"]
    if objective["task"]["name"] == "classification":
        return found + _classifier_rules(task, width, objective["task"]["num_classes"])
    return found + task_head(source, task, Hints(decoder_num_heads=objective["head"].get("heads"))).rules
