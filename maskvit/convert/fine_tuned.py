"""Fine-tuned MultiMAE files: the encoder with its input adapters, and one `output_adapters.TASK` that is a head and no decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from maskvit.convert import multimae
from maskvit.convert.reader import ConversionError
from maskvit.convert.rules import Rule, layer_norm, linear
from maskvit.convert.source import Hints, Source
from maskvit.convert.task_heads import LAYOUTS, UNUSED, WHY_UNUSED, TaskHead, task_head
from maskvit.heads import HEADS

# A key of a head that no decoder has; the first is that of the classifier of whole pictures.
CLASSIFIER = "head.weight"
HEAD = re.compile("|".join(rf"output_adapters\.([^.]+)\.{re.escape(own)}" for own in (CLASSIFIER, *(own for own, _ in LAYOUTS.values()))))
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
    fields = _target(head, task, hints)
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


def _target(head: TaskHead, task: str, hints: Hints) -> dict[str, Any]:
    """The modality that the head answers, without its patch: classes, or numbers where a head is made for them or has one channel."""
    if dict(head.options).get("form") != "regression" and head.channels > 1:
        return dict(kind="categorical", num_classes=head.channels, loss="cross_entropy", missing=255)
    fields: dict[str, Any] = dict(kind="continuous", channels=head.channels, loss="l1")
    if task == "depth" and head.channels == 1:
        hints.said.append("assumed: depth in millimeters less 2070.7764, over 777.5723, as MultiMAE's script for NYUv2 trains it")
        return fields | DEPTH
    hints.said.append(f"assumed: values of {task!r} are answered as the head gives them")
    return fields


def rules(source: Source, config: Mapping[str, Any]) -> list[Rule]:
    """Every tensor of the model in a file, whose config that is."""
    objective, task = config["objective"], _task(source)
    found, width = multimae.rules(dict(config, objective=dict(objective, outputs=()))), objective["encoder"]["width"]
    if objective["task"]["name"] == "classification":
        key = f"output_adapters.{task}"
        found += layer_norm(f"{key}.norm", "norm", width)
        return found + linear(f"{key}.head", "head", width, objective["task"]["num_classes"])
    return found + task_head(source, task, Hints(decoder_num_heads=objective["head"].get("heads"))).rules
