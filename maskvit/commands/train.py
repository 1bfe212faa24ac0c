"""Train, continue or evaluate an experiment.

python main.py --config=configs/... --workdir=runs/NAME [--config.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from maskvit.core import config_files
from maskvit.core.errors import run_command

_CONFIG = config_files.define_config("The experiment: a file of configs/ or one's own.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, metrics and pictures; the same command again resumes from here.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; with --num_processes and --process_id.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of a run over several machines.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")
_CLUSTER = flags.DEFINE_bool("cluster", False, "Find the other processes by the scheduler (TPU pods, SLURM, Kubernetes, MPI).")
_STARTUP_TIMEOUT = flags.DEFINE_integer("startup_timeout", 300, "Seconds that the processes wait for each other.", lower_bound=1)
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, the steps to trace into WORKDIR/profile.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 2 where nothing could be trained."""
    words = sys.argv[1:] if argv is None else list(argv)
    # absl's --help shows the text and the flags of the file that was started.
    sys.modules["__main__"].__doc__ = __doc__
    for flag in (_CONFIG, _WORKDIR, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _CLUSTER, _STARTUP_TIMEOUT, _PROFILE, _DEBUG):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    return run_command(lambda: train([sys.argv[0], *words]), debug="--debug" in words)


def train(argv: Sequence[str]) -> None:
    """The command, without what becomes of its errors; `argv` with the program's name."""
    config = config_files.parse_flags(argv, required=("config", "workdir"))
    from maskvit.core import processes
    from maskvit.training import setup

    if _CLUSTER.value or _COORDINATOR.value:
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _STARTUP_TIMEOUT.value)
    setup.main(config, str(_WORKDIR.value), profile=_PROFILE.value, debug=_DEBUG.value)
