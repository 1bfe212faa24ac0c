"""What our TFDS builders share: features that need no TensorFlow, metadata, reuse, progress, worker processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder of records {"id": text, "label": class, one bytes feature per modality}; b"" where a modality is absent.

    Its metadata: `modalities` (per name the fields of `STATED`), `may_lack`, `recipe` (the settings it was made with), and
    `pixel_classes` (modality -> the names of its class ids), where they have names.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        name: str,
        data_dir: str,
        modalities: Mapping[str, Mapping[str, Any]],
        label_names: Sequence[str],
        recipe: Mapping[str, Any],
        may_lack: Sequence[str] = (),
        pixel_classes: Mapping[str, Sequence[str]] | None = None,
    ):
        if not name.isidentifier():
            raise ValueError(f"the data set's name is {name!r}; use letters, digits and underscores, beginning with a letter")
        self.name = name
        self.modalities = {modality: dict(stated) for modality, stated in modalities.items()}
        self.label_names = tuple(label_names)
        # through JSON: what is compared with the stored recipe must look as if it had been stored
        self.recipe = json.loads(json.dumps(dict(recipe)))
        self.may_lack = tuple(may_lack)
        self.pixel_classes = {modality: list(names) for modality, names in (pixel_classes or {}).items()}
        super().__init__(data_dir=os.path.abspath(os.path.expanduser(data_dir)), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {"id": tfds.features.Text()}
        if self.label_names:
            features["label"] = tfds.features.ClassLabel(names=list(self.label_names))
        for modality in self.modalities:
            features[modality] = tfds.features.Tensor(shape=(), dtype=np.object_)  # bytes as they are
        described = {"modalities": self.modalities, "may_lack": list(self.may_lack), "recipe": self.recipe}
        metadata = tfds.core.MetadataDict(described | ({"pixel_classes": self.pixel_classes} if self.pixel_classes else {}))
        return tfds.core.DatasetInfo(
            builder=self,
            description=(type(self).__doc__ or "").splitlines()[0],
            features=tfds.features.FeaturesDict(features),
            metadata=metadata,
            disable_shuffling=True,  # the readers shuffle; record i of a split stays its i-th sample
        )

    def prepare(self) -> str:
        """Write the data set, or find it complete and made with the same settings. Returns its folder."""
        directory = str(self.data_path)
        if os.path.isfile(os.path.join(directory, "dataset_info.json")):
            self._check_recipe(directory)
            print(f"{self.name}: found in {directory}")
            return directory
        os.makedirs(os.path.dirname(directory), exist_ok=True)
        # TFDS writes beside the final name and renames at the end, so an interrupted build leaves no half data set.
        tfds.disable_progress_bar()  # it draws bars into logs too; `progress` says what there is to say
        with tempfile.TemporaryDirectory() as downloads:
            self.download_and_prepare(download_dir=downloads)
        counts = ", ".join(f"{split} {info.num_examples}" for split, info in self.info.splits.items())
        print(f"{self.name}: {counts} records written to {directory}")
        return directory

    def _check_recipe(self, directory: str) -> None:
        try:
            with open(os.path.join(directory, "metadata.json")) as file:
                stored = json.load(file).get("recipe", {})
        except FileNotFoundError:
            stored = {}
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{directory}/metadata.json is damaged ({error}): remove the folder, or give the new data set another name"
            ) from error
        for key in sorted({*stored, *self.recipe}):
            if stored.get(key) != self.recipe.get(key):
                raise ValueError(
                    f"{directory} was made with {key} = {stored.get(key)!r}, asked for is {self.recipe.get(key)!r}: "
                    "give the new data set another name or data_dir, or remove that folder"
                )


def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Pass items on with a bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=what, unit=" records")
        return
    began = told = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - told > 10:
            told = time.monotonic()
            print(f"{what}: {number} of {total} records, {number / (told - began):.0f}/s", flush=True)


def in_processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """`map` in the order of items, in `workers` processes (0: in this one). `function` must be picklable."""
    if workers < 1:
        yield from map(function, items)
        return
    # Ctrl-C goes to the whole process group. Workers inherit that they ignore it: this process ends them.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if threading.current_thread() is threading.main_thread() else None
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers)  # spawned, not forked: the parent may run threads (JAX's)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    with pool:
        yield from pool.imap(function, items, chunksize=16)
