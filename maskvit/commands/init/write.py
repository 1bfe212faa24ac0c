"""A recipe as the text of a config file: plain Python, a reason beside what was chosen."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from maskvit.commands.init.found import Data, as_text
from maskvit.commands.init.recipe import Recipe
from maskvit.core.errors import printable

ABOUT = {
    "total": "how long: epochs, steps, examples (\"1M examples\")",
    "global_batch": "samples per step over all devices",
    "micro_batch": "samples at once; 0: as many as fit",
    "modalities": "what the data hold; fields: maskvit/core/modalities.py",
    "objective": "what is learned; docs/objectives.md, docs/grid.md",
    "schedule": "of the learning rate: warm-up, then half a cosine to min_lr",
    "data": "workers: processes that decode",
    "checkpoint": "the newest `keep` are kept",
    "init_from": "a checkpoint to start from: docs/checkpoints.md",
    "log_every": "steps",
    "writers": "(\"tensorboard\",) or (\"wandb\",) beside metrics.jsonl",
}  # fmt: skip
WIDTH = 130
FRACTIONS = ("scale", "metres_per_count")


def config_text(recipe: Recipe, data: Data, directory: str, path: str) -> str:
    """The file. `path`: where it is written, for the commands in it."""
    lines = [f"{os.path.basename(os.path.abspath(directory))}: written by `python -m maskvit init`; change what you like.", ""]
    lines += [f"    {line}" for command in data.commands for line in command.splitlines()]
    lines += [f"    python -m maskvit train --config={path} --workdir=runs/{os.path.splitext(os.path.basename(path))[0]}"]
    lines += ["", "Any key can be set for one run: --config.total=100, --config.objective.scores.name=color.", "", "Found:"]
    lines += [f"- {line}" for line in data.found]
    if data.assumed:
        lines += ["", "Assumed:", *(f"- {line}" for line in data.assumed)]
    # The docstring must not end early, nor its backslashes mean anything.
    about = printable("\n".join(lines)).replace("\\", "\\\\").replace('"""', "'''")
    body = _block(recipe.config, recipe.reasons, "", 2)
    code = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict(\n        dict(\n{body}        )\n    )\n"
    return f'"""{about}\n"""\n\n{code}'


def _block(block: Mapping[str, Any], reasons: Mapping[str, str], above: str, depth: int) -> str:
    indent, text = "    " * (depth + 1), ""
    for key, value in block.items():
        name = f"{above}{key}"
        comment = ". ".join(part for part in (ABOUT.get(name), reasons.get(name)) if part)
        text += "".join(f"{indent}# {line}\n" for line in _wrapped(comment, WIDTH - len(indent)))
        inline = f"{indent}{key}={literal(value, key)},\n"
        below = any(reason.startswith(f"{name}.") for reason in reasons)
        if isinstance(value, Mapping) and value and all(str(k).isidentifier() for k in value) and (below or len(inline) > WIDTH):
            text += f"{indent}{key}=dict(\n{_block(value, reasons, f'{name}.', depth + 1)}{indent}),\n"
        else:
            text += inline
    return text


def literal(value: Any, key: str = "") -> str:
    """A value as Python code, blocks as dict(...); units (`FRACTIONS`) as the fractions that people write."""
    if isinstance(value, Mapping):
        if all(str(key).isidentifier() for key in value):
            return f"dict({', '.join(f'{key}={literal(item, key)}' for key, item in value.items())})"
        return "{" + ", ".join(f"{key!r}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    if value == 4 / 3:
        return "4 / 3"
    if key in FRACTIONS and "/" in as_text(value):
        return as_text(value).replace("/", " / ")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _wrapped(text: str, width: int) -> Sequence[str]:
    return textwrap.wrap(text, width - 2)
