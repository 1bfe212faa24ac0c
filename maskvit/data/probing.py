"""A look at a few records before the first batch: does each modality exist and fit its declaration?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from maskvit.core.modalities import Modality
from maskvit.data.codec import RecordError
from maskvit.data.decoding import check_values, decode_record, output_dtype
from maskvit.data.sources import Source

PROBES = 64  # records looked at, at most
READ_ERRORS = (RecordError, OSError)  # a bad sample; anything else is a fault of ours and ends the run


def probe(source: Source, modalities: Mapping[str, Modality]) -> dict[str, np.dtype]:
    """Look at a few records spread over the data: does each modality exist and fit its declaration?

    Returns: dtype per modality in the batches.

    Raises:
      ValueError: a modality that no record looked at has (and that the source does not say may be lacking), class ids
        out of range, or not one readable record.
    """
    if len(source) == 0:
        raise ValueError(f"no records: {source.describe()}")
    dtypes: dict[str, np.dtype] = {}
    readable, first_error = 0, None
    indices = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int))
    for count, index in enumerate(np.random.default_rng(0).permutation(indices)):  # not the same end of the data first
        if count >= 8 and readable and len(dtypes) == len(modalities):
            break
        try:
            record = source[int(index)]
            arrays = decode_record(record, modalities)
        except READ_ERRORS as error:
            first_error = first_error or ValueError(f"record {int(index)}: {error}")
            continue
        readable += 1
        for name, array in arrays.items():
            try:
                check_values(array, modalities[name])
            except RecordError as error:
                raise ValueError(f"record {record['id']!r}: {error}") from error
            dtype = output_dtype(array, modalities[name])
            dtypes[name] = np.promote_types(dtypes.get(name, dtype), dtype)
    if not readable:
        raise ValueError(f"none of {len(indices)} records tried is readable ({source.describe()}); the first: {first_error}")
    for name in modalities:
        if name not in dtypes and name not in source.may_lack:
            raise ValueError(
                f"modality {name!r} has no data in {source.describe()}: drop it from config.modalities, "
                f"or name it in config.data's may_lack if only some records lack it"
            )
    return {
        name: dtypes.get(name, np.dtype(np.int32 if modality.kind == "categorical" else np.float32))
        for name, modality in modalities.items()
    }
