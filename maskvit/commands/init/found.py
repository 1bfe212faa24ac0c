"""What lies in a folder, as the modalities of a config: declared from the files, and every guess named with what changes it."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maskvit.core.errors import printable
from maskvit.core.modalities import DEPTH, RGB, SEMSEG, Modality, parse_modalities
from maskvit.data import open_source
from maskvit.data.builders.layout import SPLITS, folders_in
from maskvit.data.builders.look import Facts, Look, look
from maskvit.data.decoding import decode_record
from maskvit.data.sources import STATED, open_directory

LOOKED_AT = 64  # files or records per modality that are read in full
MAX_CLASSES = 64  # distinct values up to which whole numbers in one channel are taken for class ids, whatever their name
DISTANCE, CLASSES, NORMALS = (re.compile(p, re.I) for p in ("depth|dist|range", "seg|sem|label|class|mask|part|inst", "normal"))


class Seen(NamedTuple):
    """What files of one modality hold; see `maskvit.data.builders.look.Facts`."""

    channels: int
    bits: int
    fractions: bool
    low: float
    high: float
    values: frozenset[int] | None
    zeros: float
    no_value: float
    lossy: bool


@dataclasses.dataclass(frozen=True)
class Data:
    """What `init` knows of the data.

    Attributes:
      records: split -> samples; `train`: the split to train on, `val`: the one to evaluate on, None where there is none.
      classes: number of classes of the samples, 0 without labels.
      size: (height, width), the median of the pictures looked at.
      modalities: name -> fields of `config.modalities`, without those that depend on the model's size.
      source: `config.data.train`; commands: what packs the data into that, () where they are packed.
      found, assumed: lines for the reader; what was assumed says what changes it.
    """

    records: dict[str, int]
    train: str
    val: str | None
    classes: int
    size: tuple[int, int]
    modalities: dict[str, dict[str, Any]]
    source: dict[str, Any]
    commands: tuple[str, ...]
    found: tuple[str, ...]
    assumed: tuple[str, ...]


def look_at(directory: str, data_dir: str, name: str | None, given: Mapping[str, Mapping[str, Any]]) -> Data:
    """Look at a folder of pictures in the builder's layout, plain class folders, or a prepared data set.

    Args:
      directory: the folder.
      data_dir, name: where a packed data set is to lie; the name is made of the folder's unless given.
      given: fields of modalities that the user states; they are not guessed.

    Raises FileNotFoundError where nothing is found that can be read, ValueError for what does not fit.
    """
    if not os.path.isdir(directory):
        raise FileNotFoundError(f"there is no folder {directory}")
    prepared = _prepared(directory)
    if prepared is not None:
        return _from_prepared(prepared, given)
    name = name or re.sub(r"\W+", "_", Path(os.path.abspath(directory)).name).strip("_").lower() or "pictures"
    name = name if name.isidentifier() else f"data_{name}"
    links, root = _class_folders(directory, name)
    # The links are made by the command that is printed; what they will show is looked at where it lies.
    seen = _look_at_classes(directory, links) if links else look(directory, samples=LOOKED_AT)
    return _from_folder(seen, links, root if links else directory, data_dir, name, given)


# A folder of pictures


def _class_folders(directory: str, name: str) -> tuple[dict[str, str], str]:
    """({split: folder of class folders}, folder of links) where the folder holds class folders of photos; else ({}, "").

    Class folders all hold color pictures, of other names in each, and none is called rgb.
    """
    splits = {entry: os.path.join(directory, entry) for entry in folders_in(directory) if entry.lower() in SPLITS}
    tops = splits or {"train": directory}
    folders = {entry for top in tops.values() for entry in folders_in(top)}
    if not folders or any(folder.lower() == "rgb" for folder in folders):
        return {}, ""
    try:
        seen = look(directory, samples=4)
    except (ValueError, FileNotFoundError):
        return {}, ""
    photos = all(3 in facts.channels and set(facts.bits) <= {8} and not facts.fractions for facts in seen.modalities.values())
    # The same names in all folders: several pictures of every sample, whatever the folders are called.
    paired = not any(facts.lacking for facts in seen.modalities.values())
    if not photos or paired or len(folders) < 2:
        return {}, ""
    return tops, f"{name}_root"


def _look_at_classes(directory: str, tops: Mapping[str, str]) -> Look:
    """As `look`, of class folders: all classes as the one modality rgb."""
    parts = {split: look(top, samples=max(1, LOOKED_AT // max(1, len(folders_in(top))))) for split, top in tops.items()}
    together, counts, classes = Facts(values=None), {}, set()
    for split, part in parts.items():
        counts[split] = sum(facts.files for facts in part.modalities.values())
        classes |= set(part.modalities)
        for facts in part.modalities.values():
            for field in ("sizes", "modes", "bits", "channels"):
                getattr(together, field).update(getattr(facts, field))
            together.files += facts.files
            together.looked_at += facts.looked_at
            together.lossy += facts.lossy
            together.problems |= facts.problems
            together.passed_over |= facts.passed_over
            together.low = min(x for x in (together.low, facts.low, 255.0) if x is not None)
            together.high = max(x for x in (together.high, facts.high, 0.0) if x is not None)
    return Look(os.path.abspath(directory), counts, tuple(sorted(classes)), {"rgb": together})


def _from_folder(seen: Look, links: Mapping[str, str], root: str, data_dir: str, name: str, given: Mapping[str, Mapping[str, Any]]) -> Data:
    unknown = sorted(set(given) - set(seen.modalities))
    if unknown:
        raise ValueError(f"--modality names {unknown[0]!r}, but {seen.root} holds: {', '.join(seen.modalities)}")
    empty = [modality for modality, facts in seen.modalities.items() if not facts.looked_at]
    if empty:
        problems = [f"{path}: {why}" for path, why in list(seen.modalities[empty[0]].problems.items())[:1]]
        raise ValueError(f"no file of {seen.root}/{empty[0]} can be read" + (f"; the first: {problems[0]}" if problems else ""))
    modalities, assumed = {}, []
    for modality, facts in sorted(seen.modalities.items(), key=_colors_first):
        fields, guesses = declare(modality, _seen(facts), given.get(modality, {}))
        modalities[modality] = fields
        assumed += [f"{modality}: {text}; else {_change(modality, change)}" for text, change in guesses]
        if facts.files > facts.looked_at:
            assumed.append(f"{modality}: {facts.looked_at} of {facts.files} files were read; the builder reads all and names what differs")
    if links:
        assumed.append(f"the {len(seen.classes)} folders are classes of photos; else call the one with color pictures rgb")
    train = "train" if "train" in seen.splits else next(iter(seen.splits))
    val = next((split for split in seen.splits if split != train), None)
    records = dict(seen.splits)
    words = [
        "python -m maskvit data folder",
        f"--root {shlex.quote(root)}",
        f"--data_dir {shlex.quote(data_dir)}",
        f"--name {name}",
    ]
    words.append("--modalities " + " ".join(builder_words(modality, fields) for modality, fields in modalities.items()))
    if val is None and seen.classes and records[train] >= 20:
        share = 0.1 if records[train] < 10_000 else 0.02
        words.append(f"--val_fraction {share:g}")
        val, records["val"] = "val", round(share * records[train])
        records[train] -= records["val"]
    lacking = [modality for modality, facts in seen.modalities.items() if facts.lacking]
    if lacking:
        words.append(f"--allow_missing {' '.join(lacking)}")
    if any(facts.problems for facts in seen.modalities.values()):
        words.append("--skip_bad")
    sizes = sum((facts.sizes for facts in seen.modalities.values()), collections.Counter[tuple[int, int]]())
    size = _median(sizes)
    if min(size) > 512:
        words.append("--short_side 256")
    found = [f"samples: {', '.join(f'{count} in {split}' for split, count in seen.splits.items())}"]
    found.append(
        f"classes: {', '.join(seen.classes[:8])}{', ...' if len(seen.classes) > 8 else ''} ({len(seen.classes)})"
        if seen.classes
        else "classes: none"
    )
    for modality, facts in seen.modalities.items():
        found.append(f"{modality}: {_facts_line(facts)}")
        for kind, files in (("passed over", facts.passed_over), ("cannot be used", facts.problems)):
            if files:
                path, why = next(iter(files.items()))
                found.append(f"{modality}: {len(files)} {kind}, such as {path}: {why}")
        if facts.lacking:
            found.append(f"{modality}: {facts.lacking} samples lack it; they are kept (--allow_missing)")
    commands = []
    for split, top in links.items():
        place = os.path.join(root, *([split] if len(links) > 1 or split != "train" else []))
        commands.append(
            f"mkdir -p {shlex.quote(place)} && ln -s {shlex.quote(os.path.abspath(top))} {shlex.quote(os.path.join(place, 'rgb'))}"
        )
    commands.append(" \\\n    ".join(words))
    source = dict(source="tfds", name=name, data_dir=data_dir, split=train)
    return Data(records, train, val, len(seen.classes), size, modalities, source, tuple(commands), _lines(found), _lines(assumed))


def _colors_first(item: tuple[str, Any]) -> tuple[bool, str]:
    """Order of the inputs: features and k-NN read the first one."""
    return item[0] != "rgb", item[0]


def _lines(lines: Sequence[str]) -> tuple[str, ...]:
    """Names of files are text, whatever they hold."""
    return tuple(printable(line).replace("\n", "\\n") for line in lines)


def _change(modality: str, change: str) -> str:
    """How a guess is changed: by a flag of `init` where the data state the field too, else in the config alone."""
    return f"--modality {modality},{change}" if change.split("=")[0] in STATED else f"config.modalities.{modality}.{change}"


def _seen(facts: Facts) -> Seen:
    values = None if facts.values is None else frozenset(int(value) for value in facts.values)
    return Seen(
        facts.channels.most_common(1)[0][0], max(facts.bits), facts.fractions > 0, facts.low or 0.0, facts.high or 0.0, values, facts.zeros,
        facts.no_value, facts.lossy > 0,
    )  # fmt: skip


def _facts_line(facts: Facts) -> str:
    (height, width), _ = facts.sizes.most_common(1)[0]
    sizes = f"{height} x {width}" + (f" and {len(facts.sizes) - 1} other sizes" if len(facts.sizes) > 1 else "")
    modes = ", ".join(mode for mode, _ in facts.modes.most_common(3))
    return f"{facts.files} files ({modes}), {sizes}, values {facts.low:g} to {facts.high:g}"


def _median(sizes: Mapping[tuple[int, int], int]) -> tuple[int, int]:
    sides = np.repeat(np.array(list(sizes)), list(sizes.values()), axis=0)
    height, width = np.median(sides, axis=0)
    return int(height), int(width)


# A prepared data set


def _prepared(directory: str) -> str | None:
    """The folder of the one prepared data set (its newest version) at or below a folder; None where there is none.

    Raises ValueError where there are several.
    """
    if os.path.isfile(os.path.join(directory, "dataset_info.json")):
        return directory
    below = [path.parent for depth in ("*", "*/*", "*/*/*") for path in sorted(Path(directory).glob(f"{depth}/dataset_info.json"))]
    if not below:
        return None
    sets = {path.parent for path in below}
    if len(sets) > 1:
        raise ValueError(f"{directory} holds several prepared data sets: give one of {', '.join(sorted(map(str, sets)))}")
    return str(max(below, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)]))


def _from_prepared(directory: str, given: Mapping[str, Mapping[str, Any]]) -> Data:
    info = open_directory(directory).info
    stated: dict[str, dict[str, Any]] = {name: dict(fields) for name, fields in (dict(info.metadata or {}).get("modalities") or {}).items()}
    features: dict[str, str] = {}
    if not stated:
        pictures = [name for name, feature in info.features.items() if type(feature).__name__ == "Image"]
        if not pictures:
            raise ValueError(f"{directory} has no picture among its features ({', '.join(info.features)}): write the config by hand")
        stated, features = {"rgb": {}}, {"rgb": pictures[0]}
    stated = {name: {**fields, **given.get(name, {})} for name, fields in stated.items()}
    splits = {name: split.num_examples for name, split in info.splits.items() if split.num_examples}
    if not splits:
        raise ValueError(f"{directory} holds no records")
    train = "train" if "train" in splits else next(iter(splits))
    val = next((name for name in ("val", "validation", "test", *splits) if name in splits and name != train), None)
    source: dict[str, Any] = dict(source="tfds", data_dir=directory, split=train, **({"features": features} if features else {}))
    specs = parse_modalities({name: _bare(fields) for name, fields in stated.items()})
    arrays = _some_records(specs, source, splits[train])
    modalities, assumed, found = {}, [], [f"prepared data set {info.full_name} in {directory}"]
    sizes: collections.Counter[tuple[int, int]] = collections.Counter()
    for name in dict(sorted(stated.items(), key=_colors_first)):
        if not arrays[name]:
            raise ValueError(f"none of the records looked at in {directory} has the modality {name!r}")
        sizes.update(array.shape[:2] for array in arrays[name])
        seen = _seen_in(arrays[name])
        modalities[name], guesses = declare(name, seen, stated[name])
        assumed += [f"{name}: {text}; else {_change(name, change)}" for text, change in guesses]
        found.append(f"{name}: values {seen.low:g} to {seen.high:g}" + (f", feature {features[name]!r}" if name in features else ""))
    label = info.features["label"] if "label" in info.features else None
    classes = int(getattr(label, "num_classes", 0) or 0)
    found.append(f"records: {', '.join(f'{count} in {split}' for split, count in splits.items())}; classes: {classes or 'none'}")
    return Data(splits, train, val, classes, _median(sizes), modalities, source, (), _lines(found), _lines(assumed))


def _bare(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a data set states, with a loss that goes with their kind."""
    return {**fields, "loss": "cross_entropy" if fields.get("kind") == "categorical" else "mse"}


def _some_records(specs: Mapping[str, Modality], source: Mapping[str, Any], count: int) -> dict[str, list[np.ndarray]]:
    arguments = dict(source)
    records = open_source(arguments.pop("source"), specs, **arguments)
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in specs}
    for index in sorted({count * i // LOOKED_AT for i in range(LOOKED_AT)}):
        try:
            for name, array in decode_record(records[index], specs).items():
                arrays[name].append(array)
        except (ValueError, OSError):
            continue  # the run counts and names bad records
    return arrays


def _seen_in(arrays: Sequence[np.ndarray]) -> Seen:
    first = arrays[0]
    known = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays])
    whole = first.ndim == 2 and first.dtype.kind in "iu"
    return Seen(
        first.shape[2] if first.ndim == 3 else 1, first.dtype.itemsize * 8, first.dtype.kind == "f", float(known.min(initial=0)),
        float(known.max(initial=0)), frozenset(np.unique(known).tolist()) if whole else None, float((known == 0).mean()),
        1 - known.size / sum(array.size for array in arrays), False,
    )  # fmt: skip


# From what was seen to a declaration


def declare(name: str, seen: Seen, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(fields of `config.modalities.<name>` without patch and stride, guesses as (what is assumed, FIELD=VALUE that changes it))."""
    guesses: list[tuple[str, str]] = []
    ids = seen.values is not None and seen.channels == 1 and not seen.lossy and not DISTANCE.search(name)
    kind = given.get("kind")
    if kind is None:
        kind = "continuous"
        if ids and seen.values is not None and (CLASSES.search(name) or len(seen.values) <= MAX_CLASSES):
            kind = "categorical"
            guesses.append((f"its {len(seen.values)} distinct whole numbers are class ids", "kind=continuous"))
    if kind == "categorical":
        fields = _categorical(seen, given, guesses)
    elif DISTANCE.search(name) and seen.channels == 1 or given.get("metres_per_count"):
        fields = _distance(seen, given, guesses)
    else:
        fields = _picture(name, seen, given, guesses)
    return {**fields, **given}, guesses


def _categorical(seen: Seen, given: Mapping[str, Any], guesses: list[tuple[str, str]]) -> dict[str, Any]:
    values = seen.values or frozenset({int(seen.high)})
    fields: dict[str, Any] = dict(SEMSEG, missing=given.get("missing"))
    rest = values - {255}
    if "missing" not in given and 255 in values and rest and max(rest) < 254:
        fields["missing"] = 255
        guesses.append(("the id 255 means no label", "missing=None"))
    counted = values - {fields["missing"]}
    fields["num_classes"] = max(counted, default=0) + 1
    if "num_classes" not in given:
        guesses.append((f"{fields['num_classes']} classes, as the highest id found is {max(counted, default=0)}", "num_classes=N"))
    return fields


def _distance(seen: Seen, given: Mapping[str, Any], guesses: list[tuple[str, str]]) -> dict[str, Any]:
    fields: dict[str, Any] = dict(DEPTH, missing=given.get("missing"))
    if "metres_per_count" not in given:
        if seen.fractions:
            fields["metres_per_count"] = 1 / 512 if seen.high <= 127 else 1 / 64
            unit = "1/512" if seen.high <= 127 else "1/64"
            guesses.append((f"its numbers are meters; they are packed as counts of {unit} m", "metres_per_count=1/1000 for finer counts"))
        elif seen.bits > 8:
            fields["metres_per_count"] = 1 / 1000
            guesses.append(("its whole numbers are millimeters", "metres_per_count=1/256 or what the sensor has"))
        else:
            fields |= dict(metres_per_count=None, scale=1 / 255)
            guesses.append(("its 8 bits are depth without a unit", "metres_per_count=METERS"))
    if "missing" not in given and (seen.zeros > 0 or seen.no_value > 0):
        fields["missing"] = 0.0
        guesses.append((f"0 (on {seen.zeros:.1%} of the pixels) and NaN mean that nothing was measured", "missing=None"))
    return fields


def _picture(name: str, seen: Seen, given: Mapping[str, Any], guesses: list[tuple[str, str]]) -> dict[str, Any]:
    if name == "rgb":
        return dict(RGB)
    fields: dict[str, Any] = dict(kind="continuous", channels=seen.channels, loss="mse", missing=given.get("missing"))
    most = max(abs(seen.low), abs(seen.high), 1e-6) if seen.fractions else float(2 ** min(seen.bits, 16) - 1)
    fields |= dict(scale=1 / most, mean=(0.5,), std=(0.5,))
    if NORMALS.search(name) and seen.channels == 3:
        fields["mirrored_channels"] = (0,)
        guesses.append(("its first channel points to the right, and changes its sign where a picture is mirrored", "mirrored_channels=()"))
        if seen.low < 0:
            fields |= dict(mean=(0.0,), std=(1.0,))
    elif "channels" not in given:
        guesses.append((f"{seen.channels} channels of numbers up to {most:g}, as model values around 0", f"channels={seen.channels}"))
    return fields


def builder_words(name: str, fields: Mapping[str, Any]) -> str:
    """A modality as `python -m maskvit data folder --modalities` takes it."""
    words = [name]
    for field in STATED:
        kind = fields.get("kind", "continuous")
        if (
            field not in fields
            or (field == "num_classes") != (kind == "categorical")
            and field in ("num_classes", "channels", "metres_per_count")
        ):
            continue
        if field == "kind" and name in ("rgb", "depth", "semseg") or fields[field] is None and field == "missing":
            continue
        if name == "rgb" and field == "channels":
            continue
        words.append(f"{field}={as_text(fields[field])}")
    return ",".join(words)


def as_text(value: Any) -> str:
    """A value as Python, with the fractions that people write: 1/1000 and not 0.001."""
    if isinstance(value, float) and 0 < value < 1 and abs(round(1 / value) - 1 / value) < 1e-9 / value and round(1 / value) > 2:
        return f"1/{round(1 / value)}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**31:
        return str(int(value))
    return str(value)
