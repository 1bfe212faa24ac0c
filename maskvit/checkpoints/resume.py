"""Is it the same run? What must be equal, and what may differ, where a run is resumed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

# Keys a resumed run may change, because none of them changes what is computed at a step: how often things are written
# or evaluated, loader speed, how batch and state are split and in which order sums are taken (equal but for rounding),
# when to stop, what to do when the loss is lost, and where the data lie. What these keys could change after all is compared
# by itself: the length of an epoch and of every schedule in steps (`total` moves a schedule of "100 percent"), and the data.
# Everything else makes it another run.
MAY_DIFFER = (
    "log_every",
    "picture_every",
    "checkpoint",
    "writers",
    "evaluators",
    "data.workers",
    "data.prefetch",
    "data.timeout",
    "guard",
    "data.train.data_dir",
    "micro_batch",
    "sharding",
    "objective.attention",
    "deterministic",
    "total",
)

# What lies on the disk is compared by its contents: {metadata key: (config keys of where it lies, words for it)}.
DATA = {
    "data": (("data.train.data_dir",), "the data"),
    "maps": (("objective.guidance.path", "objective.guidance.of.path"), "the stored maps"),
}
ABSENT = "(absent)"


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> list[str]:
    """Compare the metadata of a checkpoint with what this run would write, before resuming.

    Both hold "config" and, unless the checkpoint is older than they are, "steps_per_epoch", "data" (`data.identity`), "maps" (the
    same of stored maps, where there are any), "label_names" (of the classes, where they are learned and have names) and
    "durations": {dotted config key: steps} of the schedules in use. What the checkpoint lacks is logged and not compared.

    Args:
      saved: the checkpoint's metadata. `now`: this run's.
      defaults: {dotted config key: value} of keys that a config may leave out.

    Returns the allowed differences as lines (they are logged too). Raises ValueError listing all others.
    """
    now = _as_json({key: now[key] for key in ("config", "steps_per_epoch", *DATA, "label_names", "order", "durations") if key in now})
    unknown = [key for key in now if type(saved.get(key)) is not type(now[key])]
    if "config" in unknown:
        raise ValueError("the checkpoint holds no config, so nothing says which run it is of: choose another --workdir")
    if "order" in unknown:  # of more than maskvit.data.order.SORTED records
        unknown.remove("order")
        logging.warning("records come in another order than when the checkpoint was written: this epoch, some come twice, some never")
    if unknown:
        logging.info("not compared, as the checkpoint was written before they were stored: %s", ", ".join(unknown))
    refused: list[str] = []
    if "steps_per_epoch" not in unknown and saved.get("steps_per_epoch") != now.get("steps_per_epoch"):
        refused.append(f"an epoch has {now['steps_per_epoch']} steps; it had {saved['steps_per_epoch']} when the checkpoint was written")
    if "label_names" in now and "label_names" not in unknown and (other := other_classes(saved["label_names"], now["label_names"])):
        refused.append(f"class {other[0]} of the data is {other[2]}; it was {other[1]} when the checkpoint was written")
    free = list(MAY_DIFFER)
    for name, (keys, words) in DATA.items():
        if name in now and name not in unknown:
            refused += other_data(saved[name], now[name], words, keys[0])
            free += keys
    durations: dict[str, tuple[Any, Any]] = {}
    if "durations" in now and "durations" not in unknown:
        durations = {key: (saved["durations"].get(key), steps) for key, steps in now["durations"].items()}
        for key, (before, steps) in durations.items():
            if before is not None and before != steps:
                refused.append(
                    f'{key} is {steps} steps; it was {before} when the checkpoint was written. Write it as "{before} steps", or set '
                    "config.total back"
                )
    # A schedule's length is compared in steps where both are known, however it is written.
    in_steps = [key for key, (before, _) in durations.items() if before is not None]
    return _compare_configs(saved["config"], now["config"], (*free, *in_steps), defaults or {}, refused)


def check_same_config(
    saved_config: Mapping[str, Any], config: Mapping[str, Any] | ml_collections.ConfigDict, may_differ: Sequence[str] = MAY_DIFFER
) -> list[str]:
    """As `check_same_run`, for what is known of the configs alone.

    Args:
      saved_config: that of the earlier run. `config`: this run's.
      may_differ: dotted keys that may change; a key covers everything below it.
    """
    return _compare_configs(saved_config, config, may_differ, {}, [])


def other_data(saved: Mapping[str, Any], now: Mapping[str, Any], words: str = "the data", key: str = "data.train.data_dir") -> list[str]:
    """How the data differ from those of the checkpoint, both as `maskvit.data.identity` describes them; empty: they do not."""
    differences = [
        f"{words} have {now[fact]} {fact}; they had {saved[fact]} when the checkpoint was written"
        for fact in ("records", "files", "bytes")
        if fact in saved and fact in now and saved[fact] != now[fact]
    ]
    if not differences and saved.get("sizes", now.get("sizes")) != now.get("sizes", saved.get("sizes")):
        differences = [f"the files of {words} have other sizes than when the checkpoint was written"]
    before, after = saved.get("contents") or {}, now.get("contents") or {}
    compared = [index for index in after if before.get(index) and after[index]]
    changed = [index for index in compared if before[index] != after[index]]
    if changed and not differences:
        differences = [f"record {changed[0]} of {words} has other contents ({len(changed)} of the {len(compared)} records compared)"]
    return [f"{line}: config.{key} names other data" for line in differences]


def other_classes(saved: Sequence[str], now: Sequence[str]) -> tuple[int, str, str] | None:
    """(number of the first class that has another name, the saved one, the present one), both as they are shown; None: there is none.

    Names that only count the classes ("0", "1", ...), or no names at all, are those of any classes.
    """
    if any(list(names) == [str(number) for number in range(len(names))] for names in (saved, now)):
        return None
    for number, (before, after) in enumerate(itertools.zip_longest(saved, now)):
        if before != after:
            shown = ["missing" if name is None else repr(name) for name in (before, after)]
            return number, shown[0], shown[1]
    return None


def _compare_configs(
    saved_config: Any, config: Any, may_differ: Sequence[str], defaults: Mapping[str, Any], refused: list[str]
) -> list[str]:
    saved, current, standard = (_dotted(_as_json(tree)) for tree in (saved_config, config, dict(defaults)))
    allowed: list[str] = []
    refused = list(refused)
    for key in sorted(saved.keys() | current.keys()):
        before, now = (tree.get(key, standard.get(key, ABSENT)) for tree in (saved, current))
        if before != now and not (_empty(before) and _empty(now)):
            covered = any(key == free or key.startswith(free + ".") for free in may_differ)
            shown = (tree.get(key, ABSENT) for tree in (saved, current))
            (allowed if covered else refused).append("{}: {!r} in the checkpoint, {!r} in this config".format(key, *shown))
    if refused:
        listing = "\n".join(f"  {line}" for line in refused)
        raise ValueError(
            f"the workdir holds a run of another config or of other data:\n{listing}\n"
            "Choose another --workdir, or set these keys back. Free to change on resuming: " + ", ".join(may_differ)
        )
    for line in allowed:
        logging.info("config changed on resuming: %s", line)
    return allowed


def _empty(value: Any) -> bool:
    """Whether a config's value says nothing: no block, or one without keys."""
    return value is None or value == {}


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
