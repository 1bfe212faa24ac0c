"""Train, continue or evaluate an experiment: python main.py --config=configs/... --workdir=runs/NAME [--config.key=value]"""

import signal
import sys

# Until a run listens itself, Ctrl-C ends the process at once as SIGTERM does: raised amid an import, KeyboardInterrupt is a traceback,
# or is lost in a library and the run begins all the same.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags  # noqa: E402

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


def main(argv: list[str]) -> None:
    """The command, without what becomes of its errors."""
    config = config_files.parse_flags(argv, required=("config", "workdir"))
    from maskvit.core import processes
    from maskvit.training import setup

    if _CLUSTER.value or _COORDINATOR.value:
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _STARTUP_TIMEOUT.value)
    setup.main(config, str(_WORKDIR.value), profile=_PROFILE.value, debug=_DEBUG.value)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv), debug="--debug" in sys.argv))
