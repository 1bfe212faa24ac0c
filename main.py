"""Train, continue or evaluate an experiment: python main.py --config=configs/... --workdir=runs/NAME [--config.key=value]"""

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/ or one's own.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints, metrics and pictures; the same command again resumes from here.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; with --num_processes and --process_id.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of a run over several machines.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process, from 0.")
_CLUSTER = flags.DEFINE_bool("cluster", False, "Find the other processes by the scheduler (TPU pods, SLURM, Kubernetes, MPI).")
_PROFILE = flags.DEFINE_string("profile", None, "START:STOP, the steps to trace into WORKDIR/profile.")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}: write --config.key=value, with the equals sign and no spaces")
    from maskvit import train

    if _CLUSTER.value or _COORDINATOR.value:
        import jax

        # Without this the CPU backend would leave every process on its own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    train.main(_CONFIG.value, str(_WORKDIR.value), profile=_PROFILE.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
