"""Data: sources by name. What reads them is `maskvit.data.pipeline`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from maskvit.data.sources import Source, TfdsSource
from maskvit.modalities import Modality

SOURCES = {"tfds": TfdsSource}


def open_source(source: str, modalities: Mapping[str, Modality], **kwargs: Any) -> Source:
    """Open the data set that `config.data.train` or an evaluator names: `source` is a key of `SOURCES`, the rest its arguments.

    Raises:
      ValueError: an unknown source or argument, listing the known ones, or data that do not fit the modalities.
      FileNotFoundError: the data are not there.
    """
    if source not in SOURCES:
        raise ValueError(f"config.data source is {source!r}; known: {', '.join(sorted(SOURCES))}")
    known = [name for name in inspect.signature(SOURCES[source]).parameters if name != "modalities"]
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(f"config.data has unknown key {unknown[0]!r} for source {source!r}; known: {', '.join(known)}")
    return SOURCES[source](modalities, **kwargs)
