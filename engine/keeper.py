"""When the state of a run is written, and what is said where it cannot be.

Slide: none.
Paper: none.
Differs: the released code writes at the end of an epoch only, in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine import checkpoint, signals
from engine.journal import say
from engine.program import Stopped
from engine.progress import Progress

BEFORE = "before_bad_steps.pth"  # the checkpoint that last.pth was before a pause in bad steps


class Keeper:
    """While a run goes on, last.pth never holds a state that was followed by bad steps only; a full
    disk is a value, not an exception.

    A run that ends in the middle of bad steps writes such a state, or its good steps would be lost;
    but its weights may be what makes the steps bad, so the checkpoint before it stays, as
    `before_bad_steps.pth`, until a step is good.

    save_every: epochs between two writings of last.pth; save_minutes: the same in minutes,
    whichever comes first, 0: epochs only; keep_every: keep epoch_N.pth at every such epoch, 0:
    none; keep_last: keep the newest of them too; stop_on_error: whether a refused checkpoint should
    end the run. `trouble` is one line, or "". Only the main process writes.
    """

    def __init__(
        self,
        folder: Path,
        steps_per_epoch: int,
        save_every: int = 1,
        keep_every: int = 0,
        keep_last: int = 0,
        stop_on_error: bool = False,
        is_main: bool = True,
        save_minutes: float = 0.0,
    ):
        self.folder, self.steps_per_epoch, self.is_main = folder, steps_per_epoch, is_main
        self.save_every, self.keep_every, self.keep_last = save_every, keep_every, keep_last
        self.stop_on_error, self.save_minutes, self.trouble = stop_on_error, save_minutes, ""
        self.due = 0  # the epoch after which a checkpoint must still be written; 0: none
        self.written = time.monotonic()  # when last.pth was written, or the run began

    def keep(self, progress: Progress, good: bool, state: Callable[[], Mapping[str, Any]]) -> None:
        """After every step. good: the step has changed the weights; state: asked where it is
        written.

        After a bad step the checkpoint that is due waits for a good one.
        """
        epoch, into_epoch = divmod(progress.position, self.steps_per_epoch)
        if into_epoch == 0 and self.is_due(epoch):
            self.due = epoch
        if not self.is_main or progress.ended == "diverged":
            return
        late = 0 < self.save_minutes <= (time.monotonic() - self.written) / 60
        if progress.ended or (good and (self.due or late)):
            self.write(state(), final=bool(progress.ended))

    def is_due(self, epoch: int) -> bool:
        """Whether a checkpoint is written after so many whole epochs."""
        kept = self.keep_every > 0 and epoch % self.keep_every == 0
        return kept or epoch % self.save_every == 0

    def write(self, state: Mapping[str, Any], final: bool = False) -> None:
        """last.pth, and epoch_N.pth where that of the epoch that is due is to be kept."""
        file, due = self.folder / "last.pth", self.due
        self.due, self.written = 0, time.monotonic()
        try:
            if state["bad_in_row"]:
                self.put_aside(state["step"])
            checkpoint.save(file, state)
            if not state["bad_in_row"]:
                (self.folder / BEFORE).unlink(missing_ok=True)
            if due and (self.keep_last or (self.keep_every and due % self.keep_every == 0)):
                file = self.folder / f"epoch_{due:04d}.pth"
                checkpoint.save(file, state)
                checkpoint.keep_newest(self.folder, self.keep_last, self.keep_every, due)
        except OSError as error:
            message = (
                f"could not write {file} after step {state['step']}: {error.strerror or error}; "
                "what stood there before is intact"
            )
            if final or self.stop_on_error:
                self.trouble = self.trouble or message
            else:
                say(message + ", and the run goes on")

    def put_aside(self, step: int) -> None:
        """Keep last.pth under a second name too, unless it holds these weights already."""
        last = self.folder / "last.pth"
        earlier = checkpoint.step_of(last)
        if earlier is None or earlier >= step:
            return
        second = self.folder / f".{BEFORE}.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):  # some file systems know no second names
            os.link(last, second)
            os.replace(second, self.folder / BEFORE)

    def space(self, size: int, epochs: int) -> str:
        """What the checkpoints of a run need and what the disk has, in one line.

        size: bytes of one checkpoint; epochs: of the run.
        """
        needed = size * checkpoints_at_most(epochs, self.keep_every, self.keep_last)
        free = shutil.disk_usage(self.folder).free
        line = (
            f"{megabytes(size)} a checkpoint, {megabytes(needed)} in all, {megabytes(free)} free "
            f"in {self.folder}"
        )
        return line if needed < free else f"{line}: THE DISK IS TOO SMALL for this run"


def checkpoints_at_most(epochs: int, keep_every: int, keep_last: int) -> int:
    """How many a run of so many epochs has on the disk at once; last.pth stands twice while it is
    written. keep_every, keep_last: as of `Keeper`.
    """
    kept = epochs // keep_every if keep_every else 0
    return 2 + min(epochs, kept + keep_last)


def megabytes(count: float) -> str:
    """Bytes in the unit that a person reads."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def where_to_go_on(folder: str | Path, resume: str) -> str:
    """What a run that could not go on has left: the step of its last checkpoint, or that there is
    none.
    """
    last = Path(folder) / "last.pth"
    step = checkpoint.step_of(last)
    if step is None:
        return f"there is no checkpoint in {folder}: the run starts over"
    return f"{last} holds step {step}, and {same_command(resume)} goes on from there"


def same_command(resume: str) -> str:
    """How a person goes on with a run. resume: its --resume."""
    return "the same command" if resume == "auto" else "the same command with --resume auto"


def change_of_processes(then: int, now: int) -> str:
    """What a resumed run says where the number of processes is another one; else nothing."""
    if then == now:
        return ""
    return (
        f" of {then} process(es), now {now}: the same images in every step, but not the same bits, "
        "since batch statistics and random colors are per process"
    )


def check_position(path: Path, positions: list[int]) -> None:
    """All processes continue from the same batch. Raises ValueError."""
    if len(set(positions)) > 1:
        raise ValueError(
            f"the processes found different states of {path} (batches done: {positions}): every "
            "machine must see the same --output-dir"
        )


def nothing_finite(steps: int, half_precision: bool, last: Path) -> str:
    """What to do after so many bad steps in a row. last: the run's last.pth."""
    advice = (
        "--amp off, --amp bf16, or a lower --base-lr" if half_precision else "a lower --base-lr"
    )
    go_on = f"there is no checkpoint yet: start again with {advice}"
    if last.exists():
        go_on = (
            f"{last} is the checkpoint before them: continue it with {advice} and --force-resume"
        )
    before = last.with_name(BEFORE)
    if before.exists():
        go_on += f"; {before} is an earlier one, for --resume"
    return (
        f"{steps} steps in a row had no finite loss and gradient; none of them changed the "
        f"weights. {go_on}"
    )


@contextlib.contextmanager
def saying_what_is_lost(folder: str | Path, resume: str) -> Iterator[None]:
    """Turn the error of a process that has lost another one into Stopped, with one line.

    The line says what is left and where the trace is: the error may be a mistake of ours that only
    looks like a lost process.
    """
    try:
        yield
    except RuntimeError as error:
        reason = signals.lost(error)
        if not reason:
            raise
        trace = Path(folder) / f"trace_{os.environ.get('RANK', 0)}.txt"
        with contextlib.suppress(OSError):
            trace.write_text(traceback.format_exc())
            reason += f" (trace: {trace})"
        raise Stopped(f"{reason}. {where_to_go_on(folder, resume)}") from None
