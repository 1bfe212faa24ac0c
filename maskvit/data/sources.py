"""Random access to records: record i is a dict of encoded bytes per modality, a label and an id.

Every data set prepared by TensorFlow Datasets in the `array_record` format is read here, without TensorFlow.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from maskvit.core.modalities import Modality
from maskvit.data.codec import RecordError
from maskvit.data.subsets import first_of_each_class, stratified

FEATURE_MODULES = "tensorflow_datasets.core.features."  # a data set's features.json may name classes of these modules only
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # under which it names them; the last one in old files

# What a builder may state about a modality in its metadata ("modalities": {name: {field: value}}) and the config repeats.
STATED = ("kind", "channels", "num_classes", "missing", "metres_per_count")


@runtime_checkable
class Source(Protocol):
    """What the pipeline reads from. Sources travel to worker processes by pickle and open their files there.

    Attributes:
      label_names: names of the labels 0, 1, ...; () where there are none.
      pixel_classes: modality -> names of its class ids 0, 1, ..., of those whose ids have names.
      may_lack: modalities that some records may lack; where it is not empty, batches carry `present`.
    """

    label_names: tuple[str, ...]
    pixel_classes: Mapping[str, tuple[str, ...]]
    may_lack: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """-> {"id": str, optional "label": int, per modality bytes or an array; missing or b"" where absent}."""
        ...

    def describe(self) -> str:
        """One line: where the data come from."""
        ...


def has_labels(source: Source) -> bool:
    """Whether the first readable record has a label."""
    for index in range(len(source)):
        with contextlib.suppress(RecordError, OSError):
            return bool(source[index].get("label", -1) >= 0)
    return False


class ListSource:
    """Records that lie in memory: a handful of pictures of one's own, or a test's."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        label_names: Sequence[str] = (),
        may_lack: Sequence[str] = (),
        pixel_classes: Mapping[str, Sequence[str]] | None = None,
    ):
        self.records = list(records)
        self.label_names = tuple(label_names)
        self.may_lack = tuple(may_lack)
        self.pixel_classes: Mapping[str, tuple[str, ...]] = {name: tuple(classes) for name, classes in (pixel_classes or {}).items()}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": str(index), **self.records[index]}

    def describe(self) -> str:
        return f"{len(self)} records in memory"


class TfdsSource:
    """A split of a data set prepared by any TFDS builder in `array_record` format.

    Args:
      modalities: what the records must hold.
      data_dir: the folder of the prepared data: TFDS's root (then `name` says which), or that of one version.
      name: the builder's name, "name" or "name/config" or "name/config:1.0.0"; not needed where `data_dir` is one version's folder.
      split: TFDS's notation, for example "train" or "train[:90%]".
      features: modality -> feature of the data set where the two names differ, for example {"rgb": "image"}.
      label: feature with the class; None where the labels are of no interest. A data set without "label" has none.
      may_lack: modalities that some records may lack; None asks the data set's own metadata.
      per_class: only the first so many records of each class, in stored order: a share of the data with balanced classes.
        The labels are read at the start, of as many records as it takes.
      share: only this share of the records, above 0 and at most 1, drawn by `subset_seed`; each class keeps its share of them
        (`maskvit.data.subsets.stratified`). Without labels, any records.
      examples: the same for a number of records. Of `per_class`, `share` and `examples` one at most is given.
      subset_seed: what `share` and `examples` draw by; the same seed takes the same records in every run, whatever `config.seed` is.

    Raises:
      FileNotFoundError: nothing prepared there.
      ValueError: another file format, an unknown split, a modality without a feature, metadata that contradict the config, or
        features of code outside TFDS.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        data_dir: str,
        name: str = "",
        split: str = "train",
        features: Mapping[str, str] | None = None,
        label: str | None = "label",
        may_lack: Sequence[str] | None = None,
        per_class: int | None = None,
        share: float | None = None,
        examples: int | None = None,
        subset_seed: int = 0,
    ):
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
        builder = open_builder(data_dir, name)
        self.directory = str(builder.data_dir)  # one version's folder: workers open it without looking for the name
        self.name = builder.info.full_name
        self.split = split
        stored = builder.info.features
        self.features = _match_features(modalities, dict(features or {}), list(stored), self.name)
        metadata = dict(builder.info.metadata or {})
        _check_metadata(metadata, modalities, self.directory)
        if label is not None and label != "label" and label not in stored:
            raise ValueError(f"config.data label is {label!r}, but {self.name} has the features {', '.join(sorted(stored))}")
        self.label = label if label in stored else None
        self.label_names = tuple(getattr(stored[self.label], "names", None) or ()) if self.label else ()
        described = metadata.get("pixel_classes") or {}
        self.pixel_classes: Mapping[str, tuple[str, ...]] = {name: tuple(described[name]) for name in modalities if name in described}
        if may_lack is None:
            may_lack = [modality for modality in metadata.get("may_lack", ()) if modality in modalities]
        unknown = sorted(set(may_lack) - set(modalities))
        if unknown:
            raise ValueError(f"config.data may_lack names {unknown[0]!r}; declared modalities: {', '.join(modalities)}")
        self.may_lack = tuple(may_lack)
        self.file_sizes = _file_sizes(builder, split)
        self._lock = threading.Lock()
        self._reader: Any = None
        self._length = len(self._open(builder))
        self._chosen: Int[np.ndarray, " k"] | None = None
        self._subset = ""
        self._choose(builder, per_class, share, examples, subset_seed)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        if self._chosen is not None:
            index = int(self._chosen[index])
        stored = self._read(index)
        record: dict[str, Any] = {modality: _as_data(stored[feature]) for modality, feature in self.features.items()}
        record["id"] = _as_text(stored["id"]) if "id" in stored else f"{self.name}/{self.split}/{index}"
        if self.label is not None:
            record["label"] = int(stored[self.label])
        return record

    def _read(self, index: int) -> Any:
        """Record `index` of the split as TFDS gives it. Raises RecordError for a damaged one."""
        reader = self._open()
        try:
            return reader[index]
        except Exception as error:  # what readers raise on damaged files differs from one to the next
            raise RecordError(f"cannot be read from {self.directory}: {str(error) or type(error).__name__}") from error

    def label_sets(self) -> Bool[np.ndarray, "n k"] | None:
        """Which classes are right for every record, where the data set has such sets (ImageNet ReaL); None where it has none."""
        sets = stored_labels(self.directory, self.split, LABEL_SETS)
        return sets if sets is None or self._chosen is None else sets[self._chosen]

    def describe(self) -> str:
        return f"{self.name}, split {self.split!r}: {len(self)} records in {self.directory}{self._subset}"

    def _choose(self, builder: Any, per_class: int | None, share: float | None, examples: int | None, seed: int) -> None:
        """Keep the subset that one of `per_class`, `share` and `examples` asks for."""
        asked = {name: value for name, value in (("per_class", per_class), ("share", share), ("examples", examples)) if value is not None}
        if not asked:
            return
        if len(asked) > 1:
            raise ValueError(f"config.data has {' and '.join(asked)}; a subset is stated by one of them")
        where = f"{self.name}, split {self.split!r}"
        for name, least in (("per_class", 1), ("examples", 1)):
            if asked.get(name, least) < least:
                raise ValueError(f"config.data {name} is {asked[name]}; it must be at least {least}, or None for every record")
        if per_class is not None:
            if self.label is None or not self.label_names:
                raise ValueError(
                    f"config.data per_class needs labels, but {self.name} has no classes in use: set config.data label, or drop per_class"
                )
            self._chosen = first_of_each_class(self._labels(builder), self.label_names, per_class, where)
            self._subset = ", the first of each class"
        else:
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"config.data share is {share}; it must lie above 0 and be at most 1, or be None for every record")
            count = examples if examples is not None else round((share or 0) * self._length)
            if not 1 <= count <= self._length:
                raise ValueError(
                    f"config.data examples is {count}, but {where} has {self._length} records: lower it"
                    if examples is not None
                    else f"config.data share is {share}: of the {self._length} records of {where} that leaves none; raise it"
                )
            labels = np.fromiter(self._labels(builder), np.int64, self._length) if self.label else np.full(self._length, -1)
            self._chosen = stratified(labels, count, seed)
            self._subset = f", drawn by the seed {seed}" + (", each class with its share" if self.label else "")
        self._length = len(self._chosen)

    def _labels(self, builder: Any) -> Iterator[int]:
        """The label of every record of the split, -1 where it has none or cannot be read: what the builder left, else one by one."""
        count = len(self._open(builder))
        stored = stored_labels(self.directory, self.split)
        if self.label == "label" and stored is not None and len(stored) == count:
            yield from stored.tolist()
            return
        for index in range(count):
            try:
                yield int(self._read(index)[self.label])
            except RecordError:
                yield -1  # it would be no example

    def _open(self, builder: Any = None) -> Any:
        """The data set's reader, opened on first use in each process."""
        with self._lock:
            if self._reader is None:
                builder = builder or open_directory(self.directory)
                # Pictures stay encoded: our transforms decode them. TFDS would let Pillow choose any reader, and want OpenCV for 16 bits.
                try:
                    self._reader = builder.as_data_source(self.split, decoders=_undecoded(builder.info.features))
                except NotImplementedError as error:
                    raise ValueError(
                        f"{self.directory} is stored as {builder.info.file_format}; only array_record can be read at random: "
                        'prepare it with file_format="array_record"'
                    ) from error
                except (ValueError, KeyError) as error:
                    known = ", ".join(f"{key} ({value.num_examples})" for key, value in builder.info.splits.items())
                    raise ValueError(f"cannot read split {self.split!r} of {self.name}; known: {known}. {error}") from error
            return self._reader

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_reader", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _reader=None, _lock=threading.Lock())


LABELS = "labels.npz"  # beside the records: split -> label of every record, so that nobody reads all pictures to choose among them


LABEL_SETS = "label_sets.npz"  # split -> which classes are right for every record, where several may be


def stored_labels(directory: str, split: str, file: str = LABELS) -> np.ndarray | None:
    """The labels that a builder of ours left for a whole split; None where it left none, or `split` is a part of one."""
    try:
        with np.load(os.path.join(directory, file), allow_pickle=False) as labels:
            return labels[split] if split in labels else None
    except (OSError, ValueError, zipfile.BadZipFile):  # without them the records themselves are read
        return None


def _file_sizes(builder: Any, split: str) -> tuple[int, ...]:
    """Bytes of the files of every split that `split` names, in their order; () where they cannot be listed."""
    named = set(re.findall(r"\w+", split))
    try:
        return tuple(
            os.path.getsize(file) for name, info in sorted(builder.info.splits.items()) if name in named for file in info.filepaths
        )
    except OSError:  # the reader says which file is missing
        return ()


def _undecoded(features: Any) -> Any:
    """TFDS's decoders that leave every picture among features encoded, wherever it lies; None where there is none."""
    import tensorflow_datasets as tfds

    class Encoded(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, example_data: Any) -> Any:
            """The pictures of a sequence, which TFDS's own class does not know."""
            return example_data

    if isinstance(features, tfds.features.Image):
        return Encoded()
    if isinstance(features, tfds.features.Sequence):
        return _undecoded(features.feature)
    if isinstance(features, tfds.features.FeaturesDict):
        return {name: decoder for name, feature in features.items() if (decoder := _undecoded(feature))} or None
    return None


def open_builder(data_dir: str, name: str) -> Any:
    """The TFDS builder of a prepared data set, as `TfdsSource` names it. Raises FileNotFoundError where there is none."""
    import tensorflow_datasets as tfds

    if os.path.isfile(os.path.join(data_dir, "dataset_info.json")):
        return open_directory(data_dir)
    try:
        if not name:
            raise tfds.core.DatasetNotFoundError("no name given")
        below = pathlib.Path(data_dir, name.split("/")[0].split(":")[0])
        for file in (*below.glob("*/features.json"), *below.glob("*/*/features.json")):  # <version>, <config>/<version>
            _check_features(str(file.parent))
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"no prepared data set {name!r} under {data_dir}: prepare it first, or set config.data's name and data_dir to a folder "
            "that holds <name>/<version>/dataset_info.json"
        ) from error


def open_directory(directory: str) -> Any:
    """The TFDS builder of the data set in `directory`, that of one version. Runs no code but that of TFDS.

    Raises ValueError where its features are of another module, or cannot be read.
    """
    import tensorflow_datasets as tfds

    _check_features(directory)
    return tfds.builder_from_directory(directory)


def _check_features(directory: str) -> None:
    """Raise where features.json names a class of another module than TFDS's features: TFDS would import whatever it names."""
    path = os.path.join(directory, "features.json")
    try:
        with open(path, encoding="utf-8") as file:
            pending = [json.load(file)]
        while pending:
            value = pending.pop()
            if isinstance(value, list):
                pending += value
            elif isinstance(value, dict):
                for key, part in value.items():
                    if key == "json" and isinstance(part, str):
                        pending.append(json.loads(part))
                    elif not (key in CLASS_KEYS and isinstance(part, str) and (key != "type" or "content" in value)):
                        pending.append(part)
                    elif not part.startswith(FEATURE_MODULES):
                        raise ValueError(
                            f"names the class {part!r}, which would have to be imported; only features of {FEATURE_MODULES[:-1]} are read: "
                            "prepare the data set again with features of TFDS"
                        )
    except FileNotFoundError:
        return  # TFDS says what is missing
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _match_features(modalities: Mapping[str, Modality], renamed: dict[str, str], stored: list[str], data_set: str) -> dict[str, str]:
    listed = ", ".join(sorted(stored))
    unknown = sorted(set(renamed) - set(modalities))
    if unknown:
        raise ValueError(f"config.data features names modality {unknown[0]!r}; declared in config.modalities: {', '.join(modalities)}")
    matched = {modality: renamed.get(modality, modality) for modality in modalities}
    for modality, feature in matched.items():
        if feature not in stored:
            raise ValueError(
                f"modality {modality!r} has no data: {data_set} has the features {listed}, none is {feature!r}. "
                f"Map it with config.data features = {{{modality!r}: <feature>}} or drop it from config.modalities"
            )
    return matched


def _check_metadata(metadata: dict[str, Any], modalities: Mapping[str, Modality], directory: str) -> None:
    """Raise where what the builder stored about a modality contradicts the config, or is not of the form that ours store."""
    described = metadata.get("modalities") or {}
    if not isinstance(described, dict) or not all(isinstance(stated, dict) for stated in described.values()):
        raise ValueError(f"{directory}/metadata.json: 'modalities' is {described!r:.80}; a block of fields per modality belongs there")
    if not isinstance(metadata.get("may_lack", []), (list, tuple)):
        raise ValueError(f"{directory}/metadata.json: 'may_lack' is {metadata['may_lack']!r:.80}; a list of modalities belongs there")
    for name, stated in described.items():
        if name not in modalities:
            continue
        for field in STATED:
            ours = getattr(modalities[name], field)
            if field not in stated or _same(stated[field], ours):
                continue
            if field == "missing" and stated[field] is None and ours is not None and not ours >= 0:
                continue  # counts and ids are never that: it only gives padding a value
            raise ValueError(
                f"{directory} states {field} = {stated[field]!r} for modality {name!r}, config.modalities.{name}.{field} is {ours!r}: "
                "set the config to what is stored, or build the data set again"
            )
    named = metadata.get("pixel_classes") or {}
    for name, spec in modalities.items():
        classes = named.get(name, []) if isinstance(named, dict) else None
        listed = isinstance(classes, (list, tuple)) and all(isinstance(one, str) for one in classes)
        if not listed or (classes and len(classes) != spec.num_classes):
            raise ValueError(
                f"{directory}/metadata.json: 'pixel_classes' of {name!r} is {classes!r:.80}; a list of the names of "
                f"{spec.num_classes} classes belongs there"
            )


def _same(stored: Any, ours: Any) -> bool:
    if isinstance(stored, (int, float)) and isinstance(ours, (int, float)):
        return bool(np.isclose(stored, ours, rtol=1e-6, atol=0, equal_nan=True))
    return stored == ours


def _as_data(value: Any) -> bytes | np.ndarray:
    """Encoded bytes as they are, however TFDS wraps them; arrays as arrays that the transforms know."""
    if isinstance(value, bytes):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OS":
        return bytes(array.item())
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _as_text(value: Any) -> str:
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
