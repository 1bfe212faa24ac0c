"""Data: sources by name. What reads them is `maskvit.data.batches`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.modalities import Modality
from maskvit.data.sources import Source, TfdsSource

SOURCES = {"tfds": TfdsSource}


def open_source(source: str, modalities: Mapping[str, Modality], **kwargs: Any) -> Source:
    """Open the data set that `config.data.train` or an evaluator names: `source` is a key of `SOURCES`, the rest its arguments.

    Raises:
      ValueError: an unknown source or argument, listing the known ones, or data that do not fit the modalities.
      FileNotFoundError: the data are not there.
    """
    constructor = look_up("config.data source", SOURCES, source)
    check_arguments("config.data", constructor, kwargs, given=("modalities",))
    return constructor(modalities, **kwargs)
