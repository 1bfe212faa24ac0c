"""Several processes of one run: how they find each other, and how they come to one decision."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

# How long a process waits for another one's decision, in seconds: hashing a large checkpoint takes minutes.
PATIENCE = 3600
HELLO_BYTES = 4096


def cpu_threads() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ProcessError(RuntimeError):
    """The processes of a run did not find each other, or one of them reports what stops them all."""


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float) -> None:
    """Connect the processes of one run; all of them or none: ProcessError after `timeout` seconds names who is missing.

    Args:
      coordinator: host:port of process 0; None asks the scheduler (SLURM, MPI, TPU pods, Kubernetes) for all three.
      num_processes, process_id: how many there are, and which this is, from 0.

    JAX's own start aborts the interpreter where a process is missing, and names nobody. So the processes meet first on the
    coordinator's port, which JAX takes over once all are there.
    """
    import jax

    if coordinator is None:
        coordinator, num_processes, process_id = _scheduled(num_processes, process_id, timeout)
    if num_processes is None or process_id is None:
        raise ProcessError("--coordinator needs --num_processes and --process_id, or leave it to the scheduler with --cluster")
    if not 0 <= process_id < num_processes:
        raise ProcessError(f"--process_id is {process_id}; of {num_processes} processes it is one of 0 to {num_processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ProcessError(f"--coordinator is {coordinator!r}; expected host:port, for example node1:12345")
    if num_processes > 1:
        meet(host, int(port), num_processes, process_id, timeout)
    # Without this the CPU backend would leave every process on its own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Of a process that SLURM or MPI started JAX would see one device, whose number is the process's on its machine.
    detection = "deactivate" if _alone_on_its_machine() else None
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method=detection, initialization_timeout=max(60, int(timeout))
    )


def _alone_on_its_machine() -> bool:
    """Whether SLURM or MPI started one process per machine, which then works on all its devices."""
    if "SLURM_STEP_NUM_NODES" in os.environ and "SLURM_NTASKS" in os.environ:
        return os.environ["SLURM_STEP_NUM_NODES"] == os.environ["SLURM_NTASKS"]
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def _scheduled(num_processes: int | None, process_id: int | None, timeout: float) -> tuple[str, int, int]:
    """What JAX reads from the scheduler's environment."""
    from jax._src.clusters import ClusterEnv  # private, and the only place where JAX says it before it connects

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, num_processes, process_id, None, None, int(timeout))
    except Exception as error:  # schedulers' environments fail in ways of their own
        raise ProcessError(f"--cluster: the scheduler's settings cannot be read ({type(error).__name__}: {error})") from error
    coordinator, num_processes, process_id, _ = found
    if coordinator is None or num_processes is None or process_id is None:
        raise ProcessError("--cluster: no scheduler was found; give --coordinator=host:port, --num_processes and --process_id")
    return coordinator, num_processes, process_id


def meet(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> None:
    """Return on every process once all have come to `host`:`port`, where process 0 counts them.

    ProcessError after `timeout` seconds, on every process that came: it names those that did not.
    """
    deadline = time.monotonic() + timeout
    if process_id:
        _report_to_first(host, port, num_processes, process_id, timeout, deadline)
    else:
        _gather(port, num_processes, timeout, deadline)


def _gather(port: int, num_processes: int, timeout: float, deadline: float) -> None:
    """Process 0: collect the others' names, then tell all of them how it went."""
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=num_processes)
    except OSError as error:
        raise ProcessError(f"process 0 cannot listen on port {port} of --coordinator ({error.strerror}): choose another port") from error
    came: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        problem = None
        while problem is None and len(came) < num_processes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = [i for i in range(1, num_processes) if i not in came]
                problem = f"{_named(missing)} of {num_processes} did not join within {timeout:g} s"
                break
            hello = _read_line(connection)
            if not isinstance(hello, dict) or "maskvit_process" not in hello:
                continue  # whatever else knocks at ports
            number, count = hello["maskvit_process"], hello.get("of")
            if count != num_processes:
                problem = f"process {number} was started with --num_processes={count}, process 0 with {num_processes}"
            elif number in came or number == 0:
                problem = f"two processes were started with --process_id={number}"
            came[number] = connection
        for connection in came.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
        for connection in came.values():  # they hang up first: a port that process 0 closed first would stay blocked for a minute
            _read_line(connection)
    if problem:
        raise ProcessError(problem)


def _report_to_first(host: str, port: int, num_processes: int, process_id: int, timeout: float, deadline: float) -> None:
    """Every other process: say who this is, then wait for process 0's word."""
    hello = json.dumps({"maskvit_process": process_id, "of": num_processes}).encode() + b"\n"
    while True:
        # Process 0 is given a little longer, so that its word arrives before this process gives up.
        left = deadline + 5 - time.monotonic()
        if left <= 0:
            raise ProcessError(
                f"process 0 of {num_processes} did not answer at {host}:{port} within {timeout:g} s (this is process {process_id})"
            )
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as connection:
            connection.sendall(hello)
            connection.settimeout(left)
            answer = _read_line(connection)
            if isinstance(answer, dict):
                if answer.get("problem"):
                    raise ProcessError(f"{answer['problem']} (this is process {process_id})")
                return
        time.sleep(0.2)


def _read_line(connection: socket.socket) -> Any:
    """One line of JSON; None for anything else."""
    line = b""
    try:
        if connection.gettimeout() is None:
            connection.settimeout(5)
        while not line.endswith(b"\n") and len(line) < HELLO_BYTES:
            received = connection.recv(HELLO_BYTES)
            if not received:
                return None
            line += received
        return json.loads(line)
    except (OSError, ValueError):
        return None


def _named(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def agree(name: str, problem: str | None) -> None:
    """Every process calls this with its own problem or None; where any has one, all raise ProcessError with the first one's text.

    `name` is the same on every process and used once. Any thread may call it: it goes through JAX's coordination service and
    not over the devices, so that it cannot get between two steps.
    """
    import jax

    if jax.process_count() == 1:
        if problem is not None:
            raise ProcessError(problem)
        return
    client = _client()
    mine = jax.process_index()
    with _service(name):
        if mine == 0:
            problems = {0: problem}
            for other in range(1, jax.process_count()):
                problems[other] = json.loads(client.blocking_key_value_get(f"maskvit/{name}/{other}", PATIENCE * 1000))
            told = [f"{text} (on process {other})" if other else text for other, text in problems.items() if text is not None]
            verdict = told[0] if told else None
            client.key_value_set(f"maskvit/{name}/verdict", json.dumps(verdict))
        else:
            client.key_value_set(f"maskvit/{name}/{mine}", json.dumps(problem))
            verdict = json.loads(client.blocking_key_value_get(f"maskvit/{name}/verdict", PATIENCE * 1000))
    if verdict is not None:
        raise ProcessError(verdict)


def first_decides(name: str, decide: Callable[[], Any]) -> Any:
    """Process 0 calls `decide`; every process returns its result (JSON data), or raises ProcessError with its error's text.

    On process 0 the error itself is raised. `name` as in `agree`.
    """
    import jax

    if jax.process_count() == 1:
        return decide()
    client = _client()
    if jax.process_index() == 0:
        try:
            result = decide()
        except Exception as error:
            client.key_value_set(f"maskvit/{name}", json.dumps({"error": str(error)}))
            raise
        client.key_value_set(f"maskvit/{name}", json.dumps({"result": result}))
        return result
    with _service(name):
        answer = json.loads(client.blocking_key_value_get(f"maskvit/{name}", PATIENCE * 1000))
    if "error" in answer:
        raise ProcessError(answer["error"])
    return answer["result"]


def _client() -> Any:
    from jax._src import distributed  # private; Orbax uses it too, for the same purpose

    return distributed.global_state.client


@contextlib.contextmanager
def _service(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ProcessError(f"the other processes cannot be reached ({name}: {str(error).partition(chr(10))[0]})") from error
