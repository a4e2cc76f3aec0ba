"""The parts of a run and their common life: new or resumed, saved, ended. Any model, any data.

Slide: none.
Paper: none.
Differs: not in the released code. A program puts its own loop around these parts; each part's file
says what it owns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint, files, keeper, processes
from engine.batches import Batches, Collate, run_batches
from engine.gradient import Gradient
from engine.journal import Journal
from engine.keeper import Keeper
from engine.loader import Skipped, collate
from engine.lock import Lock
from engine.meter import Meter
from engine.program import Stopped
from engine.progress import Progress
from engine.ranks import gather_rows
from engine.schedule import Schedule
from engine.signals import StopSignals
from engine.undo import Undo


@dataclass(frozen=True)
class Options:
    """What a person may choose about a run, whatever is trained. Plain values, named as the options
    of train.py.
    """

    output_dir: str
    batch_size: int  # of all ranks together
    seed: int = 0
    accumulate: int = 1  # parts per batch
    workers: int = -1  # processes that read images for each rank, -1: one per core
    resume: str = "auto"
    save_every: int = 1  # epochs
    save_minutes: float = 0.0
    keep_every: int = 0  # epochs
    keep_last: int = 0
    on_save_error: str = "continue"
    max_bad_share: float = 0.01
    max_bad_steps: int = 20
    tensorboard: bool = False


@dataclass
class Run:
    """One rank's parts."""

    options: Options
    place: processes.Place
    schedule: Schedule
    model: nn.Module
    gradient: Gradient
    undo: Undo
    progress: Progress
    batches: Batches
    meter: Meter
    journal: Journal
    keeper: Keeper
    lock: Lock | None  # the main process's
    # Kept with the checkpoint, so that another run can tell whether it may continue
    settings: Mapping[str, Any]
    num_images: int
    # on the clock of time.perf_counter, moved back by what the run took before it was interrupted
    began: float
    # what a program wants to know again when it is resumed, plain values
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where all of the run is written."""
        return Path(self.options.output_dir)

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: the model, and what the optimizer will keep per
        weight.
        """
        # Velocity, or two moments
        kept = 1 if isinstance(self.gradient.optimizer, torch.optim.SGD) else 2
        tensors = list(self.model.state_dict().values()) + self.gradient.trained * kept
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def trouble(self) -> str:
        """Why this rank cannot go on, in one line, or ""."""
        return self.batches.trouble or self.keeper.trouble

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(
            format=checkpoint.FORMAT,
            config=dict(self.settings),
            **self.progress.state(),
            **self.meter.state(),
            num_images=self.num_images,
            world_size=self.place.world_size,
            seconds=time.perf_counter() - self.began,
            notes=dict(self.notes),
            model=self.model.state_dict(),
            optimizer=self.gradient.optimizer.state_dict(),
            scaler=self.gradient.scaler.state_dict(),
        )

    @contextlib.contextmanager
    def rescued(self) -> Iterator[None]:
        """Around the loop: whatever exception ends it, the unfinished step is undone, and the main
        process writes what was learned.
        """
        try:
            yield
        except BaseException:
            # Not where some weights have moved and others have not, and not where none have.
            if not self.gradient.moving and self.progress.step:
                self.undo.undo()
                if self.place.rank == 0:
                    self.keeper.write(self.state(), final=True)
            raise

    def close(self) -> None:
        """Whatever ends the run: its workers end, and its folder is free."""
        self.batches.close()
        self.journal.close()
        if self.lock:
            self.lock.release()

    def end(self, received: str) -> bool:
        """After the loop: True where the run is done, False where it pauses, which is said.

        received: the signal, or "". Raises Stopped where the run could not go on.
        """
        self.journal.close()
        self.report_skipped()
        progress, last, half = self.progress, self.folder / "last.pth", self.gradient.dtype
        if progress.ended == "diverged":
            raise Stopped(keeper.nothing_finite(progress.bad_in_row, half is not None, last))
        if self.trouble or progress.ended == "trouble":
            reason = self.trouble or "another process stopped the run, and says why"
            raise Stopped(f"{reason}. {keeper.where_to_go_on(self.folder, self.options.resume)}")
        if progress.ended == "signal":
            again = keeper.same_command(self.options.resume)
            self.journal.print(
                f"stopped by {received or 'another process'} after step {progress.step} of "
                f"{progress.last_step}; {last} is written, and {again} goes on from there"
            )
        return progress.ended != "signal"

    def report_skipped(self) -> None:
        """Say at the end how many images could not be read."""
        skipped = self.batches.skipped
        if skipped.names:
            self.journal.print(
                f"skipped  {len(skipped.names)} images could not be read and were replaced by "
                f"their neighbors: {skipped.file}"
            )


def open_run(
    options: Options,
    place: processes.Place,
    dtype: torch.dtype | None,
    schedule: Schedule,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Sequence[Any],
    view: Callable,
    values: Sequence[str],
    settings: Mapping[str, Any],
    changed: Callable[[Mapping[str, Any]], list[str]],
    touched: Sequence[Tensor] = (),
    black: Any = None,
    collate: Collate = collate,
) -> Run:
    """All parts of a run on this rank, new or resumed; its folder is made.

    dtype: of autocast, None for float32; view(image, rng): what a batch needs of an image; values:
    names of what every step adds to the log; settings: kept with the checkpoint; changed(saved):
    what has changed since and must not; touched: tensors that a forward changes, which a bad step
    must return; black, collate: of `run_batches`. Raises ValueError, with one line, for what the
    person who started it can change.
    """
    began, folder, is_main = time.perf_counter(), Path(options.output_dir), place.rank == 0
    gradient = Gradient(model, optimizer, place.device, dtype, options.accumulate)
    progress = Progress(schedule.last_step, options.max_bad_steps)
    meter = Meter(values, options.batch_size)
    notes: dict[str, Any] = {}
    last = folder / "last.pth" if options.resume == "auto" else Path(options.resume)
    if options.resume != "none" and (options.resume != "auto" or last.exists()):
        saved = checkpoint.restore(last, model, optimizer, gradient.scaler, changed)
        progress.restore(saved)
        meter.restore(saved)
        notes = dict(saved.get("notes", {}))
        began -= saved["seconds"]
        if is_main:
            others = keeper.change_of_processes(saved["world_size"], place.world_size)
            print(f"resumed  {last} after step {progress.step}{others}")
    position = torch.tensor([progress.position], device=place.device)
    keeper.check_position(last, gather_rows(position, [1] * place.world_size).tolist())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder) if is_main else None
        journal = Journal(folder, progress.step, schedule.last_step, is_main, options.tensorboard)
        if is_main:
            if progress.position == 0:  # a new run names its own
                (folder / "skipped.txt").unlink(missing_ok=True)
            files.remove_leftovers(folder)
            files.write_json(folder / "config.json", settings)
    except OSError as error:
        raise ValueError(
            f"--output-dir {folder} cannot be written to: {error.strerror or error}"
        ) from None
    skipped = Skipped(folder / "skipped.txt", len(images), options.max_bad_share)
    batches = run_batches(
        images,
        view,
        options.batch_size,
        options.seed,
        progress.position,
        place,
        options.workers,
        skipped,
        black,
        collate,
    )
    kept = Keeper(
        folder,
        schedule.steps_per_epoch,
        options.save_every,
        options.keep_every,
        options.keep_last,
        options.on_save_error == "stop",
        is_main,
        options.save_minutes,
    )
    parts = Undo(touched), progress, batches, meter, journal, kept, lock, settings
    return Run(options, place, schedule, model, gradient, *parts, len(images), began, notes)


def bare_run(
    options: Options,
    place: processes.Place,
    dtype: torch.dtype | None,
    schedule: Schedule,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    touched: Sequence[Tensor] = (),
) -> Run:
    """The parts of a run that take a step, and none that reads or writes: to measure one.

    Arguments as of `open_run`.
    """
    gradient = Gradient(model, optimizer, place.device, dtype, options.accumulate)
    progress = Progress(schedule.last_step, options.max_bad_steps)
    nothing: Any = None
    parts = Undo(touched), progress, nothing, nothing, nothing, nothing, None, {}
    return Run(options, place, schedule, model, gradient, *parts, 0, time.perf_counter())


def live(
    output_dir: str,
    resume: str,
    set_up: Callable[[], Run],
    loop: Callable[[Run, StopSignals], None],
    finish: Callable[[Run], None],
    prepared: Callable[[Run], None] | None = None,
) -> int:
    """The life of a run on this rank: set up, loop, end; returns the exit status.

    loop(run, signals): all steps; finish(run): what a run leaves when it is done, on the main
    process; prepared(run): called before the first step, to look on. Whatever ends the loop, what
    was learned is kept. Raises Stopped, ValueError, and what is a mistake of ours.
    """
    with StopSignals() as signals, contextlib.ExitStack() as at_end:
        with keeper.saying_what_is_lost(output_dir, resume):
            run = set_up()
        at_end.callback(run.close)
        with keeper.saying_what_is_lost(output_dir, resume), run.rescued():
            if prepared:
                prepared(run)
            loop(run, signals)
        if run.end(signals.received) and run.place.rank == 0:
            finish(run)
        return signals.status if run.progress.ended == "signal" else 0
