"""A run that is killed, stopped, damaged and started anew for an hour, compared with one that nobody touched. Not part of the suite.

    python -m tests.soak --minutes 60 --workdir DIR [--seed 0]     ends with status 1 where anything was not as it should be
    python -m tests.soak --summary DIR                             the table of a log

One config (guided MultiMAE on rendered scenes, checkpoints every 10 steps, pictures, k-NN) is run once undisturbed. Then, round by
round, the same run is started in a new folder, disturbed by one random fault at each start until a start reaches its end, and its
last checkpoint must hold the same bits, its metrics the same figures. DIR/soak.jsonl has one line per fault, DIR/failures the
output of every child that did something else than documented in docs/running.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, EVERY, TIMEOUT = 480, 10, 20.0
HANG = 300.0  # seconds without an end that count as a hang
SPEED = ("images_per_second", "data_wait", "mfu", "seconds", "time", "steps_per_second", "step_seconds")


class Child:
    """`python main.py` with its output collected as it comes."""

    def __init__(self, config: str, workdir: pathlib.Path, *flags: str, file_limit: int = 0):
        command = [sys.executable, str(ROOT / "main.py"), f"--config={config}", f"--workdir={workdir}", *flags]
        limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))) if file_limit else None
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit, start_new_session=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True)
        self._reader.start()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def end(self, seconds: float = HANG) -> int | None:
        """The exit status, None where it hangs (it is then asked for its stacks and killed)."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            time.sleep(2)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None
        finally:
            # Workers that outlive a killed run would hold the pipe open and the cores busy.
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._reader.join(10)
        return self.process.returncode


class Round:
    """One run and its faults."""

    def __init__(self, config: str, workdir: pathlib.Path, draw: random.Random):
        self.config, self.workdir, self.draw = config, workdir, draw
        self.damaged_rows = 0
        self.told = ""  # why the last start was not as it should be

    @property
    def checkpoints(self) -> list[pathlib.Path]:
        folder = self.workdir / "checkpoints"
        steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "manifest.json").exists()] if folder.is_dir() else []
        return [folder / str(step) for step in sorted(steps)]

    def start(self, workers: int | None = None, **options: Any) -> Child:
        workers = self.draw.choice([0, 1, 2, 2, 3]) if workers is None else workers
        return Child(self.config, self.workdir, f"--config.data.workers={workers}", **options)

    def until(self, child: Child, condition: Callable[[], bool], seconds: float = HANG) -> bool:
        """Wait for a condition while the child runs; whether it came."""
        end = time.monotonic() + seconds
        while child.running and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def working(self, child: Child) -> bool:
        """Wait until the child has begun to train, and a moment more."""
        began = self.until(child, lambda: any("arithmetic" in line for line in child.lines))
        if not began and child.running:
            self.told = f"did not begin to train within {HANG:.0f} s"
        time.sleep(self.draw.uniform(0, 12))
        return began and child.running

    def expect(self, child: Child, *statuses: int, text: str = "") -> int | None:
        status = child.end()
        said = "".join(child.lines)
        if status is None:
            self.told = f"hung for {HANG:.0f} s"
        elif self.told:
            pass
        elif status not in (*statuses, 0):
            self.told = f"exit status {status}, expected one of {statuses}"
        elif "Traceback" in said:
            self.told = "a traceback"
        elif status != 0 and text and text not in said:
            self.told = f"said nothing of {text!r}"
        if self.told:
            self.told += "\n" + said
        return status

    # Faults: each starts the run, does its harm, and returns the exit status.

    def kill_anywhere(self) -> int | None:
        child = self.start()
        self.until(child, lambda: False, self.draw.uniform(0, 40))
        os.killpg(child.process.pid, signal.SIGKILL)
        return self.expect(child, -signal.SIGKILL)

    def kill_while_training(self) -> int | None:
        child = self.start()
        self.working(child)
        child.process.send_signal(signal.SIGKILL)
        return self.expect(child, -signal.SIGKILL)

    def kill_while_saving(self) -> int | None:
        child = self.start()
        self.working(child)
        self.until(child, lambda: any(self.workdir.glob("checkpoints/.unfinished-*")))
        time.sleep(self.draw.uniform(0, 0.4))
        child.process.send_signal(signal.SIGKILL)
        return self.expect(child, -signal.SIGKILL)

    def stop(self, number: int, anywhere: bool = False, twice: bool = False) -> int | None:
        child = self.start()
        if anywhere:
            self.until(child, lambda: False, self.draw.uniform(8, 40))
        else:
            self.working(child)
        child.process.send_signal(number)
        if twice:
            time.sleep(self.draw.uniform(0, 3))
            child.process.send_signal(number)
        # Before Python has its handlers a signal ends the process as it ends any other.
        return self.expect(child, 128 + number, -number)

    def sigterm(self) -> int | None:
        return self.stop(signal.SIGTERM)

    def sigterm_anywhere(self) -> int | None:
        return self.stop(signal.SIGTERM, anywhere=True)

    def sigterm_twice(self) -> int | None:
        return self.stop(signal.SIGTERM, twice=True)

    def ctrl_c(self) -> int | None:
        return self.stop(signal.SIGINT)

    def sigterm_to_the_group(self) -> int | None:
        child = self.start()
        self.working(child)
        if child.running:
            os.killpg(child.process.pid, signal.SIGTERM)
        return self.expect(child, 128 + signal.SIGTERM)

    def harm_a_worker(self, number: int) -> int | None:
        from tests.runs import loader_workers

        child = self.start()
        self.working(child)
        workers = loader_workers(child.process.pid) if child.running else []
        try:
            worker = self.draw.choice(workers)
            os.kill(worker, number)
        except (IndexError, ProcessLookupError):  # drawn with none, or over; those of an evaluation end with it
            child.process.send_signal(signal.SIGKILL)
            return self.expect(child, -signal.SIGKILL)
        return self.expect(child, 2, text=str(worker))

    def dead_worker(self) -> int | None:
        return self.harm_a_worker(signal.SIGKILL)

    def hung_worker(self) -> int | None:
        return self.harm_a_worker(signal.SIGSTOP)

    def second_start(self) -> int | None:
        first = self.start()
        self.working(first)
        second = self.start()
        self.until(second, lambda: not first.running)
        if first.running:
            status = second.end()
            said = "".join(second.lines)
            if status != 2 or "in use by process" not in said:
                self.told = f"the second start ended with status {status}\n{said}"
            first.process.send_signal(signal.SIGTERM)
            return self.expect(first, 143)
        second.process.send_signal(signal.SIGKILL)
        second.end()
        return self.expect(first)

    def full_disk(self) -> int | None:
        # No workers: their shared memory is a file too, and no disk.
        child = self.start(workers=0, file_limit=self.draw.choice([20_000, 60_000]))
        return self.expect(child, 2)

    def damage(self, change: Callable[[pathlib.Path], None]) -> int | None:
        """Harm the newest checkpoint where an older one stays, then kill the run that starts from it."""
        damaged = len(self.checkpoints) > 1
        if damaged:
            newest = self.checkpoints[-1]
            files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
            change(self.draw.choice(files))
        child = self.start()
        self.working(child)
        child.process.send_signal(signal.SIGKILL)
        status = self.expect(child, -signal.SIGKILL)
        if damaged and not any("SKIPPED" in line for line in child.lines):
            self.told = self.told or "the damaged checkpoint was not named\n" + "".join(child.lines)
        return status

    def flipped_bit(self) -> int | None:
        def flip(path: pathlib.Path) -> None:
            data = bytearray(path.read_bytes())
            data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(data)

        return self.damage(flip)

    def truncated_file(self) -> int | None:
        return self.damage(lambda path: os.truncate(path, self.draw.randrange(path.stat().st_size)))

    def deleted_file(self) -> int | None:
        return self.damage(lambda path: path.unlink())

    def unlisted_file(self) -> int | None:
        return self.damage(lambda path: path.with_name("extra").write_bytes(b"weights from elsewhere"))

    def damaged_metrics(self) -> int | None:
        path = self.workdir / "metrics.jsonl"
        if path.exists() and path.stat().st_size > 2:
            data = bytearray(path.read_bytes())
            place = self.draw.randrange(len(data) - 1)
            data[place] ^= 0x80
            path.write_bytes(data)
            self.damaged_rows += 2  # the flipped byte may be the end of a line
        return self.kill_while_training()

    def finish(self) -> int | None:
        return self.expect(self.start(), 0)


FAULTS = (
    "kill_anywhere", "kill_while_training", "kill_while_saving", "kill_while_saving", "sigterm", "sigterm_anywhere", "sigterm_twice",
    "sigterm_to_the_group", "ctrl_c", "dead_worker", "hung_worker", "second_start", "full_disk", "flipped_bit", "truncated_file",
    "deleted_file", "unlisted_file", "damaged_metrics",
)  # fmt: skip


def write_experiment(workdir: pathlib.Path) -> str:
    """The config file of the run, on freshly rendered scenes."""
    from tests.runs import make_scenes, small_run, write_config

    config = small_run(
        make_scenes(workdir / "data"), guided=True, total=f"{STEPS} steps", log_every=7, micro_batch=8,
        checkpoint=dict(every=f"{EVERY} steps", keep=3), picture_every="60 steps",
        evaluators=dict(knn=dict(type="knn", every="90 steps", ks=(3,), batch_size=8)),
    )  # fmt: skip
    config["data"] = {**config["data"], "workers": 2, "timeout": TIMEOUT}
    return write_config(workdir / "config.py", config)


def rows_of(workdir: pathlib.Path) -> dict[tuple[int, bool], dict[str, Any]]:
    """The rows of metrics.jsonl by (step, whether of training), without figures of speed."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if len({(row["step"], "loss" in row) for row in rows}) < len(rows):
        raise ValueError(f"{workdir} has a row of metrics twice")
    return {(row["step"], "loss" in row): {k: v for k, v in row.items() if not any(word in k for word in SPEED)} for row in rows}


def differences(whole: pathlib.Path, run: Round) -> list[str]:
    """What of a finished run differs from the undisturbed one."""
    import numpy as np
    import orbax.checkpoint as ocp

    from maskvit.checkpoints import find_checkpoint
    from maskvit.core.types import tree_paths

    one, two = (tree_paths(ocp.PyTreeCheckpointer().restore(find_checkpoint(path) / "state")) for path in (whole, run.workdir))
    found = [f"other arrays: {sorted(one.keys() ^ two.keys())[:3]}"] if one.keys() != two.keys() else []
    found += [f"{name} differs" for name in one if name in two and not np.array_equal(np.asarray(one[name]), np.asarray(two[name]))]
    expected, rows = rows_of(whole), rows_of(run.workdir)
    found += [f"row {key} differs: {rows[key]} against {expected.get(key)}" for key in rows if rows[key] != expected.get(key)]
    if len(expected.keys() - rows.keys()) > run.damaged_rows:
        found.append(f"rows are missing: {sorted(expected.keys() - rows.keys())}")
    kept = [p.name for p in (run.workdir / "checkpoints").iterdir() if not p.name.isdigit() and ".damaged" not in p.name]
    return found + [f"left behind: {name}" for name in kept]


def soak(minutes: float, seed: int, workdir: pathlib.Path) -> int:
    """Rounds of faults until the time is over (the last round is finished); the number of failures."""
    workdir.mkdir(parents=True, exist_ok=True)
    failures, log = workdir / "failures", workdir / "soak.jsonl"
    config = write_experiment(workdir)
    whole = Round(config, workdir / "whole", random.Random(0))
    whole.finish()
    if whole.told:
        raise SystemExit(f"the undisturbed run failed: {whole.told}")
    end, number, failed = time.monotonic() + 60 * minutes, 0, 0

    def note(run: Round, fault: str, status: int | None, began: float) -> None:
        nonlocal failed
        steps = run.checkpoints
        line = dict(
            round=number, fault=fault, status=status, seconds=round(time.monotonic() - began, 1), step=int(steps[-1].name) if steps else 0
        )
        if run.told:
            failed += 1
            failures.mkdir(exist_ok=True)
            (failures / f"{number}_{fault}_{failed}.txt").write_text(run.told)
            line["failure"] = run.told.splitlines()[0]
            run.told = ""
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    while time.monotonic() < end:
        draw = random.Random(seed + number)
        run = Round(config, workdir / f"round_{number}", draw)
        status: int | None = None
        while status != 0:
            fault, began = draw.choice(FAULTS) if time.monotonic() < end else "finish", time.monotonic()
            status = getattr(run, fault)()
            note(run, fault, status, began)
            if fault == "finish" and status != 0:
                break
        began = time.monotonic()
        try:
            found = differences(whole.workdir, run) if status == 0 else ["the run did not reach its end"]
        except Exception as error:
            found = [f"cannot be compared: {error}"]
        run.told = "\n".join(found)
        note(run, "comparison", status, began)
        if not found:
            shutil.rmtree(run.workdir)
        number += 1
    print(summary(workdir))
    return failed


def summary(workdir: pathlib.Path) -> str:
    """Starts by fault, their exit statuses and failures, as a table."""
    lines = [json.loads(line) for line in (workdir / "soak.jsonl").read_text().splitlines()]
    rows = ["| fault | starts | exit statuses | failures |", "|---|---|---|---|"]
    for fault in dict.fromkeys((*sorted(set(FAULTS)), "finish", "comparison")):
        here = [line for line in lines if line["fault"] == fault]
        statuses = collections.Counter(str(line["status"]) for line in here)
        told = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        rows.append(f"| {fault} | {len(here)} | {told} | {sum('failure' in line for line in here)} |")
    rounds = sum(line["fault"] == "comparison" for line in lines)
    starts = len(lines) - rounds
    return "\n".join([*rows, f"{starts} starts, {rounds} rounds, {sum('failure' in line for line in lines)} failures"])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--summary", type=pathlib.Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.summary))
        return 0
    if not arguments.workdir:
        parser.error("give --workdir, or --summary")
    return 1 if soak(arguments.minutes, arguments.seed, arguments.workdir.resolve()) else 0


if __name__ == "__main__":
    sys.exit(main())
