"""Is it the same run? What must be equal, and what may differ, where a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

# Keys a resumed run may change, because none of them changes what is computed at a step: how often things are written
# or evaluated, loader speed, how the global batch is split and in which order sums are taken (equal but for rounding),
# when to stop (the schedule has lengths of its own), what to do when the loss is lost, and where the data lies. Everything
# else makes it another run.
MAY_DIFFER = (
    "log_every",
    "picture_every",
    "checkpoint",
    "evaluators",
    "data.workers",
    "data.prefetch",
    "data.timeout",
    "guard",
    "data.train.data_dir",
    "micro_batch",
    "deterministic",
    "total",
)


def check_same_run(
    saved_config: Mapping[str, Any], config: Mapping[str, Any] | ml_collections.ConfigDict, may_differ: Sequence[str] = MAY_DIFFER
) -> list[str]:
    """Compare the config of a checkpoint with this run's before resuming.

    Args:
      saved_config: the config in the checkpoint's metadata. `config`: this run's.
      may_differ: dotted keys that may change; a key covers everything below it.

    Returns the allowed differences as lines (they are logged too). Raises ValueError listing all others: the workdir
    holds another config's run.
    """
    saved, current = _dotted(_as_json(saved_config)), _dotted(_as_json(config))
    allowed: list[str] = []
    refused: list[str] = []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key, "(absent)"), current.get(key, "(absent)")
        if before != now:
            covered = any(key == free or key.startswith(free + ".") for free in may_differ)
            (allowed if covered else refused).append(f"{key}: {before!r} in the checkpoint, {now!r} in this config")
    if refused:
        listing = "\n".join(f"  {line}" for line in refused)
        raise ValueError(
            f"the workdir holds a run of another config:\n{listing}\n"
            "Choose another --workdir, or set these keys back. Free to change on resuming: " + ", ".join(may_differ)
        )
    for line in allowed:
        logging.info("config changed on resuming: %s", line)
    return allowed


def _as_json(config: Any) -> Any:
    """The config as it reads back from JSON: tuples are lists, ConfigDicts are dicts."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config))


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested dicts; an empty dict is a leaf of its own, lists are leaves."""
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_dotted(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
