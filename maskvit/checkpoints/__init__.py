"""Checkpoints: Orbax writes them, a manifest of digests proves them, and another model can start from them.

One checkpoint is one directory named by its step, in `WORKDIR/checkpoints`:

    checkpoints/1200/state/         Orbax: a plain nested dict of arrays {"step", "params", "opt_state", "objective_state", "skipped"}
    checkpoints/1200/metadata/      Orbax: JSON with "config", "versions" and whatever the trainer adds (data position, source, licence)
    checkpoints/1200/manifest.json  size and SHA-256 of every other file, written last

Orbax 0.12 restores flipped bits without an error and never falls back to an older step; the manifest and
`CheckpointStore.latest_valid` add both. Names beside the steps: `.unfinished-N` marks a save in progress, so that a
step without a manifest is either the remains of a killed save (removed at the next start) or damaged (never
trusted); `N.damaged` is a step that failed its check and was moved out of the way; `best` names the step of `config.best`.
"""

from __future__ import annotations

from maskvit.checkpoints.arrays import trusting
from maskvit.checkpoints.manifest import CheckpointError, find_checkpoint, manifest_digest, verify, write_manifest
from maskvit.checkpoints.resume import check_same_config, check_same_run, other_classes
from maskvit.checkpoints.store import CheckpointStore
from maskvit.checkpoints.weights import (
    LoadRow,
    covering,
    format_report,
    init_from,
    load_adam,
    load_epochs_done,
    load_label_names,
    load_objective_state,
    load_origin,
    load_params,
    load_statistics,
    load_teacher,
    load_weights,
    save_imported,
    versions,
    with_stored_teacher,
)

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "LoadRow",
    "check_same_config",
    "check_same_run",
    "covering",
    "find_checkpoint",
    "format_report",
    "init_from",
    "manifest_digest",
    "load_adam",
    "load_epochs_done",
    "load_label_names",
    "load_objective_state",
    "load_origin",
    "load_params",
    "load_statistics",
    "load_teacher",
    "load_weights",
    "other_classes",
    "save_imported",
    "trusting",
    "verify",
    "versions",
    "with_stored_teacher",
    "write_manifest",
]
