"""The loop that trains, saves, evaluates, and ends: what was computed is saved before anything that may fail or wait.

Three orders make a resumed run equal an uninterrupted one. A checkpoint at step s holds the state before batch s, and batch s is a
function of s. At a step, first everything is saved with a note of what is due, and then that is done. Whatever decides about
the run (signals, a failed loader, skipped updates) is read from the results of a step, so every process decides alike.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskvit.checkpoints import CheckpointError, CheckpointStore
from maskvit.core.durations import is_time
from maskvit.core.processes import first_decides
from maskvit.core.types import Batch, TrainState
from maskvit.data.workers import LoaderError
from maskvit.evaluators import Evaluator
from maskvit.metrics.accumulate import Accumulator
from maskvit.metrics.progress import Progress
from maskvit.metrics.results import ResultsFile
from maskvit.metrics.writers import Writers
from maskvit.sharding import ReplicaError, check_replicas
from maskvit.training.best import Best, FigureFell
from maskvit.training.disk import DiskFull, require_space
from maskvit.training.flight import Flight
from maskvit.training.profiling import Profiler
from maskvit.training.signals import StopAsked, StopSignals, name
from maskvit.training.spikes import Guard
from maskvit.training.waiting import Waiting
from maskvit.training.watchdog import Watchdog

LOG = logging.getLogger("maskvit")
PICTURES = "masking"  # the picture, and its name among what is due


class NoBatch(Exception):
    """Told along with step `step`, which is void: process `process` has no batch. Raised at the same place on every process."""

    def __init__(self, step: int, process: int, signal_number: int):
        super().__init__(step, process, signal_number)
        self.step, self.process, self.signal_number = step, process, signal_number


class Stopped(SystemExit):
    """The run was asked to end; its state is saved. The exit status is 128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C."""


@dataclass
class Run:
    """All that `loop` needs, made by `maskvit.training.setup.setup`.

    `periods`: steps from one "checkpoint", "picture" or comparison of "replicas" to the next. `evaluations`: the same of every one
    of `evaluators`. `metadata` goes with every checkpoint. `saved` is the metadata of the checkpoint that the run resumes from.
    Where nothing is left to train the rest is None: `compiled` is called as (state, batch, seed, largest loss, word of the processes)
    and returns (state, `Results`); `batch` is the first one, fetched already. `closing` ends what the run has opened.
    """

    workdir: Path
    total_steps: int
    steps_per_epoch: int
    log_every: int
    seed: int
    periods: Mapping[str, int]
    evaluations: Mapping[str, int]
    evaluators: Mapping[str, Evaluator]
    draws: bool
    store: CheckpointStore
    log: Writers
    profile: tuple[int, int] | None
    timeout: float
    saved: Mapping[str, Any]
    metadata: dict[str, Any]
    state: Any
    guard: Guard
    best: Best | None = None
    results: ResultsFile | None = None
    painter: Any = None
    signals: Any = None
    batches: Any = None
    place: Any = None
    batch: Any = None
    telling: Any = None
    compiled: Any = None
    throughput: Any = None
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


def loop(run: Run) -> TrainState:
    """Train to the end and close the run; returns the last state.

    Where nothing is left to train, what the last stop left over is made up for; `total = 0` evaluates once.
    """
    with run.closing:
        if run.compiled is not None:
            return Loop(run).run()
        step = int(run.state.step)
        for name in run.evaluators if run.total_steps == 0 else left_over(run, step):
            if name != PICTURES:
                write_figures(run, step, name, evaluate(run.evaluators, name, run.state, lambda: None))
            elif run.painter is not None:
                run.log.write_images(step, run.painter(run.state))
        LOG.info("nothing to train: step %d of %d", step, run.total_steps)
        return run.state


def left_over(run: Run, step: int) -> list[str]:
    """What was due when the checkpoint of `step` was saved, and was not done before the stop."""
    known = [name for name in run.saved.get("due", ()) if name in run.evaluators or (name == PICTURES and run.draws)]
    written = run.log.written(step)
    done = np.array([any(name == there or there.startswith(f"{name}/") for there in written) for name in known], bool)
    if known and jax.process_count() > 1:
        done = multihost_utils.broadcast_one_to_all(done)  # process 0 alone writes
    return [name for name, is_done in zip(known, done, strict=True) if not is_done]


def first_batch(batches: Any, signals: StopSignals) -> dict[str, Any]:
    """The batch a run starts with; Stopped where a signal comes while it is waited for: nothing is there to save."""
    try:
        with signals.interruptible():
            return next(batches)
    except StopAsked as asked:
        LOG.info("stopped by %s before the first step", name(asked.number))
        raise Stopped(128 + asked.number) from None


class Loop:
    """Trains from the run's state on. `run()` returns the last state."""

    def __init__(self, run: Run) -> None:
        self._run, self._signals = run, run.signals
        self.state, self.step = run.state, int(run.state.step)
        self._batch: Batch = run.batch
        run.state = run.batch = None  # the first step gives them away, and nobody else may hold a copy
        self._abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state)
        self._bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self._fetched = True
        self._seed = np.int32(run.seed)  # an argument, not a constant: runs that differ in their seed alone share a compilation
        self._accumulated = Accumulator(run.saved.get("metrics"))
        self._bad_before = int(run.saved.get("bad_samples", 0))
        self._progress = Progress(run.total_steps, self.step)
        self._watchdog = Watchdog(2 * run.timeout)  # the loader of another process is given its time first
        self._flight = Flight(self._watchdog)
        self._profiler = Profiler(run.profile, run.workdir / "profile", lambda: self._settle(0))
        self._told = 0  # number of a signal, told along with the steps settled
        self._failure: BaseException | None = None  # why this process has no batch
        self._due: list[str] = []
        self._waiting = Waiting(run.batches, self._batch.size // jax.process_count())
        for part in (self._watchdog, self._progress, self._profiler):
            run.closing.callback(part.close)

    def run(self) -> TrainState:
        """Train to the end, or to what ends the run before it."""
        try:
            self._due = left_over(self._run, self.step) if self._run.saved else self._due_now()
            self._recall_best()
            if self._run.best and self._run.best.evaluator in self._due and not self._run.saved:
                self._save()  # what may be the best checkpoint is the one that the run begins with
            self._evaluate()
            while self.step < self._run.total_steps and not (self._run.best and self._run.best.exhausted):
                self._settle(1)
                self._heed()
                self._take_step()
                if self.step % self._run.log_every == 0 or self.step == self._run.total_steps:
                    self._write_row()
                if is_time(self.step, self._run.periods["replicas"], self._run.total_steps, last=False):
                    self._settle(0)
                    check_replicas(self.state.params)
                self._due = self._due_now()
                if is_time(self.step, self._run.periods["checkpoint"], self._run.total_steps) or set(self._due) - {PICTURES}:
                    self._save()
                self._evaluate()
            self._settle(0)
            self._wait_for_save()
            self._tell_best()
        except StopAsked as asked:
            self._stop(asked.number)
        except NoBatch as told:
            self._end_without_batch(told)
        except (FloatingPointError, ReplicaError, CheckpointError, DiskFull):
            raise  # the state is not worth saving, or cannot be saved
        except FigureFell:
            self._wait_for_save()
            raise
        except Exception:
            self._rescue()
            raise
        return self.state

    # A step

    def _take_step(self) -> None:
        """Hand the next batch to the devices; two steps are then under way."""
        if not self._fetched:
            self._fetch()
        self._profiler.before(self.step)
        word = self._run.telling(self._signals.asked, has_batch=self._failure is None)
        limit = np.float32(self._run.guard.limit() if self._run.guard.on_spike == "skip" else np.inf)
        self.state, results = self._run.compiled(self.state, self._batch, self._seed, limit, word)
        self._flight.add(self.step, results)
        self._fetched, self.step = False, self.step + 1
        self._progress.update(self.step)

    def _fetch(self) -> None:
        """The next batch. Where a process of several gets none, it takes part in void steps with the last one until all know."""
        if self._failure is not None:
            return
        try:
            with self._run.throughput.waiting(), self._signals.interruptible():
                host_batch = next(self._run.batches)
            self._batch, self._fetched = self._run.place(host_batch), True
        except (StopAsked, Exception) as error:
            if jax.process_count() == 1:
                raise
            self._failure = error

    def _settle(self, keep: int) -> None:
        """Wait until at most `keep` steps are under way, and note what the others tell."""
        for step, results in self._flight.settle(keep):
            self._told = self._told or int(results.told[0])
            if results.told[1]:
                raise NoBatch(step, int(results.told[1]) - 1, self._told)
            self._accumulated.add(results.metrics)
            self._run.throughput.step()
            total, count = results.metrics["loss"]
            self._run.guard.observe(step, float(total) / float(count), bool(results.metrics["skipped"][0]), float(results.norm))

    # What may end the run, or turn it back

    def _heed(self) -> None:
        """Act on what the steps before the last told: the same at the same step on every process, and in a resumed run."""
        asked = self._signals.asked if jax.process_count() == 1 else self._told
        if asked:
            self._stop(asked)
        for line in self._run.guard.judge(before=self.step - 1):
            self._progress.message(f"ALARM {line}")
        if self._run.guard.must_go_back():
            self._go_back()

    def _stop(self, number: int) -> None:
        self._save()
        self._wait_for_save()
        LOG.info("stopped by %s at step %d, state saved: the same command resumes from here", name(number), self.step)
        raise Stopped(128 + number)

    def _end_without_batch(self, told: NoBatch) -> None:
        """Every process saves the state of the last complete step, and ends."""
        for _ in self._flight.settle(0):
            pass  # void like the first
        self.step, self._due = told.step, []
        if told.signal_number:
            self._stop(told.signal_number)
        self._save()
        self._wait_for_save()
        LOG.error("the state of step %d is saved: the same command resumes from there", self.step)
        raise self._failure or LoaderError(f"process {told.process} of {jax.process_count()} has no batch; its own message says why")

    def _rescue(self) -> None:
        """Save the state of the last complete step where an error ends the run; several processes cannot know that all are here."""
        if jax.process_count() > 1:
            return
        try:
            self._save()
            self._wait_for_save()
            LOG.error("the state of step %d is saved: the same command resumes from there", self.step)
        except Exception as another:
            LOG.error("the state of step %d could not be saved: %s", self.step, another)

    def _wait_for_save(self) -> None:
        with self._watchdog.watching(f"the checkpoint of step {self.step}"):
            self._run.store.wait()

    def _go_back(self) -> None:
        """Continue from the last healthy checkpoint, without the batches since; raises FloatingPointError where that did not help."""
        guard, store, first = self._run.guard, self._run.store, self.step
        self._settle(0)
        self._wait_for_save()
        target = store.latest_healthy()
        what = f"{guard.in_a_row} updates in a row were skipped" if guard.in_a_row else guard.trouble
        if target is None or target == guard.returned_to:
            why = (
                "there is no checkpoint from before to return to" if target is None else f"it was so again after returning to step {target}"
            )
            raise FloatingPointError(
                f"stopped at step {first}: {what}, and {why}. Look at the data and at config.optimizer.base_lr"
                + ("" if target is None else f"; the checkpoint of step {target} is from before")
            )
        jax.tree.map(lambda x: x.delete(), self.state)  # two states may not fit
        restored = store.restore(target, self._abstract)
        count = {"step": first, "skipped": int(restored.skipped) + first - target}
        self.state = restored._replace(
            **{name: jax.device_put(np.int32(value), getattr(self._abstract, name).sharding) for name, value in count.items()}
        )
        guard.went_back(target)
        self._progress.message(
            f"step {first}: {what}. Back to the parameters of step {target}; the batches of steps {target} to {first - 1} are left out"
        )

    # What is written

    def _save(self) -> None:
        """Save the state before batch `step`, with what is due at it. Saved once, it is not saved again."""
        run = self._run
        self._settle(0)
        with run.throughput.paused(), self._watchdog.watching(f"the checkpoint of step {self.step}"):
            if not run.store.has(self.step):
                require_space(run.store.directory, self._bytes, f"the checkpoint of step {self.step}")
            run.store.save(
                self.step,
                self.state,
                dict(
                    run.metadata,
                    bad_samples=self._bad_samples(),
                    due=self._due,
                    healthy=run.guard.healthy(),
                    guard=run.guard.as_json(),
                    metrics=self._accumulated.as_json(),
                    best=run.best.as_json() if run.best else None,
                ),
            )

    def _bad_samples(self) -> int:
        return self._bad_before + self._run.batches.bad_samples

    def _write_row(self) -> None:
        """The metrics since the last row, summed over exactly these steps."""
        self._settle(0)
        skipped = round(self._accumulated.sums()["skipped"][0])
        values = self._accumulated.summarize()
        del values["skipped"]
        speed = self._run.throughput.read()
        with self._run.throughput.paused(), self._watchdog.watching("the records that show what the loader spends its time on"):
            self._waiting.look(self.step, speed)
        values |= speed | {"skipped_steps": float(self.state.skipped), "epoch": self.step / self._run.steps_per_epoch}
        if self._bad_samples():
            values["bad_samples"] = float(self._bad_samples())
        self._progress.report(self.step, values)
        for alarm in (key for key, value in values.items() if key.startswith("alarm/") and value > 0):
            self._progress.message(f"step {self.step}: ALARM {alarm.removeprefix('alarm/')} in {values[alarm]:.0%} of the last steps")
        if skipped:
            self._progress.message(f"step {self.step}: {skipped} of the last steps skipped, loss or gradient was not finite")
        self._run.log.write_scalars(self.step, values)

    # What is due beside training

    def _due_now(self) -> list[str]:
        run, step = self._run, self.step
        watched = run.best.evaluator if run.best and run.best.margin is not None else ""
        due = [name for name, period in run.evaluations.items() if is_time(step, period, run.total_steps, first=name == watched)]
        return due + [PICTURES] * (run.draws and is_time(step, run.periods["picture"], run.total_steps, first=True))

    def _evaluate(self) -> None:
        """Do what is due. All processes evaluate together, and notice together where one is asked to stop."""
        if not self._due:
            return
        self._settle(0)
        with self._run.throughput.paused():
            while self._due:
                if self._due[0] == PICTURES:
                    self._draw()
                else:
                    self._between()
                    with self._giving_up():
                        figures = evaluate(self._run.evaluators, self._due[0], self.state, self._between)
                    write_figures(self._run, self.step, self._due[0], figures)
                    if self._run.best and self._due[0] == self._run.best.evaluator:
                        self._observe(figures)
                del self._due[0]

    def _observe(self, figures: Mapping[str, Any]) -> None:
        """Keep the checkpoint of this step where its figure is the best so far."""
        best = self._run.best
        assert best is not None
        if best.observe(self.step, figures):
            self._run.store.keep_best(self.step)

    def _recall_best(self) -> None:
        """Observe what was evaluated at this step already: the checkpoint that the run resumes from was saved before."""
        best = self._run.best
        if best and best.evaluator in self._run.saved.get("due", ()) and best.evaluator not in self._due:
            figures = first_decides(f"best/{self.step}", lambda: self._run.log.figures(self.step))
            self._observe(figures)

    def _tell_best(self) -> None:
        best = self._run.best
        if best and best.step is not None:
            ended = f"no better value in {best.since} evaluations; " if self.step < self._run.total_steps else ""
            told = f"{ended}the best {best.figure} is {best.value:.2f}, of step {best.step}; its checkpoint is kept as best"
            LOG.info("step %d: %s", self.step, told)

    def _draw(self) -> None:
        try:
            with self._giving_up():
                pictures = self._run.painter(self.state)  # of no sample but on process 0
            self._run.log.write_images(self.step, pictures)
        except Exception as error:  # a picture is not worth a run
            LOG.warning("step %d: the pictures could not be drawn: %s", self.step, error)

    def _giving_up(self) -> contextlib.AbstractContextManager[None]:
        """Around what a signal may end at once. Several processes must agree first: see `_between`."""
        return self._signals.interruptible() if jax.process_count() == 1 else contextlib.nullcontext()

    def _between(self) -> None:
        """Between two batches of an evaluation: StopAsked on every process where any is asked to stop."""
        if jax.process_count() > 1:
            asked = int(multihost_utils.process_allgather(np.int32(self._signals.asked)).max())
            if asked:
                raise StopAsked(asked)


def evaluate(evaluators: Mapping[str, Evaluator], name: str, state: TrainState, between: Callable[[], None]) -> dict[str, Any]:
    """The figures and pictures of the evaluator `name`, called "NAME/figure"."""
    return {f"{name}/{key}": value for key, value in evaluators[name].run(state.params, state.objective_state, between)}


def write_figures(run: Run, step: int, evaluator: str, found: Mapping[str, Any]) -> None:
    """To the writers, the results and the terminal: figures as numbers, pictures as files."""
    pictures = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
    figures = {name: value for name, value in found.items() if name not in pictures}
    if run.results is not None:  # before the writers: what they hold is not done again after a stop
        plain = {name.removeprefix(f"{evaluator}/"): value for name, value in figures.items()}
        run.results.write(step, evaluator, run.evaluators[evaluator].protocol(), plain, trained=run.total_steps > 0)
    run.log.write_scalars(step, figures)
    if pictures:
        run.log.write_images(step, pictures)
    LOG.info("step %d  %s", step, "  ".join(f"{key} {value:.2f}" for key, value in figures.items()))
