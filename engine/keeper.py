"""When the state of a run is written, and what is said where it cannot be.

Slide: none. Paper: none. Differs: the released code writes at the end of an epoch only, in place.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine import checkpoint, processes
from engine.journal import say
from engine.progress import Progress


class Keeper:
    """last.pth never holds a state that was followed by bad steps only; a full disk is a value, not
    an exception.

    save_every: epochs between two writings of last.pth; keep_every: keep epoch_N.pth at every such
    epoch, 0: none; keep_last: keep the newest of them too; stop_on_error: whether a refused
    checkpoint should end the run. `trouble` is one line, or "". Only the main process writes."""

    def __init__(
        self,
        folder: Path,
        steps_per_epoch: int,
        save_every: int = 1,
        keep_every: int = 0,
        keep_last: int = 0,
        stop_on_error: bool = False,
        is_main: bool = True,
    ):
        self.folder, self.steps_per_epoch, self.is_main = folder, steps_per_epoch, is_main
        self.save_every, self.keep_every, self.keep_last = save_every, keep_every, keep_last
        self.stop_on_error, self.trouble = stop_on_error, ""
        self.due = 0  # the epoch after which a checkpoint must still be written; 0: none

    def keep(self, progress: Progress, good: bool, state: Callable[[], Mapping[str, Any]]) -> None:
        """After every step. good: the step has changed the weights; state: called where something
        is written.

        After a bad step the checkpoint that is due waits for a good one.
        """
        epoch, into_epoch = divmod(progress.position, self.steps_per_epoch)
        if into_epoch == 0 and self.is_due(epoch):
            self.due = epoch
        if not self.is_main or progress.ended == "diverged":
            return
        if progress.ended or (self.due and good):
            self.write(state(), final=bool(progress.ended))

    def is_due(self, epoch: int) -> bool:
        """Whether a checkpoint is written after so many whole epochs."""
        return epoch % self.save_every == 0 or (
            self.keep_every > 0 and epoch % self.keep_every == 0
        )

    def write(self, state: Mapping[str, Any], final: bool = False) -> None:
        """last.pth, and epoch_N.pth where that of the epoch that is due is to be kept."""
        file, due = self.folder / "last.pth", self.due
        self.due = 0
        try:
            checkpoint.save(file, state)
            if due and (self.keep_last or (self.keep_every and due % self.keep_every == 0)):
                file = self.folder / f"epoch_{due:04d}.pth"
                checkpoint.save(file, state)
                checkpoint.keep_newest(self.folder, self.keep_last, self.keep_every)
        except OSError as error:
            message = (
                f"could not write {file} after step {state['step']}: {error.strerror or error}; "
                "what stood "
                "there before is intact"
            )
            if final or self.stop_on_error:
                self.trouble = self.trouble or message
            else:
                say(message + ", and the run goes on")


def same_command(resume: str) -> str:
    """How a person goes on with a run. resume: its --resume."""
    return "the same command" if resume == "auto" else "the same command with --resume auto"


def change_of_processes(then: int, now: int) -> str:
    """What a resumed run says where the number of processes is another one; else nothing."""
    if then == now:
        return ""
    return (
        f" of {then} process(es), now {now}: the same images in every step, but not the same bits, "
        "since batch "
        "statistics and random colors are per process"
    )


def check_position(path: Path, positions: list[int]) -> None:
    """All processes continue from the same batch. Raises ValueError."""
    if len(set(positions)) > 1:
        raise ValueError(
            f"the processes found different states of {path} (batches done: {positions}): every "
            "machine "
            "must see the same --output-dir"
        )


def nothing_finite(steps: int, half_precision: bool, last: Path) -> str:
    """What to do after so many bad steps in a row."""
    advice = (
        "--amp off, --amp bf16, or a lower --base-lr" if half_precision else "a lower --base-lr"
    )
    go_on = (
        f"{last} is the checkpoint before them: continue it with {advice} and --force-resume"
        if last.exists()
        else f"there is no checkpoint yet: start again with {advice}"
    )
    return (
        f"{steps} steps in a row had no finite loss and gradient; none of them changed the "
        f"weights. {go_on}"
    )


def lost_line(error: RuntimeError, folder: str | Path, resume: str) -> str:
    """What is said where another process is lost; the trace goes to a file that the line names."""
    last = Path(folder) / "last.pth"
    intact = f"; {last} is intact" if last.exists() else ""
    trace = keep_trace(error, Path(folder))
    return f"{processes.lost(error)}{intact}, and {same_command(resume)} goes on; {trace}"


def keep_trace(error: Exception, folder: Path) -> str:
    """Write an error's trace to trace.RANK.txt, since only its words tell a lost process from a
    mistake of ours; returns where it is, in a few words."""
    file = folder / f"trace.{os.environ.get('RANK', 0)}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as refused:
        return f"the trace could not be written to {file}: {refused.strerror or refused}"
    return f"the trace is in {file}"
