"""The life of a run of any model: batches in order, one agreement per step, a state that survives,
a log. A program puts its own step between `remember` and `end_step`, as train.py does.
"""

import contextlib
import datetime
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate
from tqdm import tqdm

from engine import checkpoints, files, folder, log, processes
from engine.batches import Collate, Samples, load, name_skipped, order_of
from engine.guards import StopSignals, lock
from engine.processes import Place
from engine.program import BEGAN, Stopped
from engine.ranks import gather_objects, sum_over_ranks

MAX_BAD_STEPS = 20  # in a row without a finite loss and gradient, before a run stops [U]
# What a run counts, and a checkpoint keeps beside the tensors
COUNTS = ("position", "bad_steps", "bad_in_row", "logged", "kept", "sums", "notes")


@dataclass(frozen=True)
class Options:
    """What a person may choose about a run, whatever is trained."""

    output_dir: str  # "": nothing is written and nothing is resumed
    batch_size: int  # of all ranks together
    last_step: int  # where the run ends
    seed: int = 0
    accumulate: int = 1  # parts per batch
    workers: int = -1  # processes that read images for each rank, -1: one per core
    resume: str = "auto"  # output_dir/last.pth where it is there; none; force: although changed
    log_every: int = 10  # steps
    save_minutes: float = 10.0  # between two writings of last.pth
    keep_every: int = 0  # epochs between two files epoch_N.pth, 0: none


def by_type(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Lists of one type each: a GPU copies only such a list at once."""
    found = defaultdict(list)
    for tensor in tensors:
        found[tensor.dtype].append(tensor)
    return list(found.values())


class Run:
    """One rank's part of a run, new or resumed. Raises ValueError for what a person can change.

    view(image, rng): what a batch needs of an image; changed(saved): what a checkpoint was made
    with and this run is not; names: of the numbers that every step is judged by.
    """

    def __init__(
        self, options: Options, place: Place, model: nn.Module, optimizer: torch.optim.Optimizer,
        images: Sequence[Any], view: Callable[[Any, Any], Any], settings: Mapping[str, Any],
        changed: Callable[[Mapping[str, Any]], list[str]] = lambda saved: [],
        collate: Collate = default_collate, names: Sequence[str] = ("loss",),
    ):  # fmt: skip
        size, count = options.batch_size, len(images)
        folder.require_batches(size, count, place.world_size, options.accumulate)
        self.options, self.place, self.model, self.optimizer = options, place, model, optimizer
        self.images, self.settings, self.names = images, dict(settings), (*names, "grad_norm")
        self.folder = Path(options.output_dir) if options.output_dir else None
        self.writes = bool(options.output_dir) and place.rank == 0  # the folder, and to stdout
        self.signals, self.held = StopSignals(bool(self.folder)), contextlib.ExitStack()
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        # Good steps; batches; epochs at the last save; steps without finite numbers, and in a row
        self.steps = self.position = self.kept = self.bad_steps = self.bad_in_row = 0
        self.logged, self.sums = 0, [0.0] * len(self.names)  # step of the last line; since then
        self.notes: dict[str, Any] = {}  # what a program wants to know again when it is resumed
        self.ended = ""  # then "done", "signal", "trouble" or "diverged"
        self.began, self.written = BEGAN, time.perf_counter()
        self.timed_at = self.heard = self.written  # heard: the last line about a step
        self.images_per_second = math.inf  # of the last line about a step
        # Of a step: "forward", which moves buffers, then "moving": some weights have, others not
        self.stage = ""
        self.buffers = by_type(model.buffers())
        self.before = [[buffer.clone() for buffer in some] for some in self.buffers]
        if self.folder:
            self.open_folder(changed)
        look = dict(unit="step", ncols=79, leave=False, disable=not self.writes or None)
        self.bar = tqdm(total=options.last_step, initial=self.steps, **look)
        self.held.enter_context(self.bar)
        self.timed = self.steps
        self.network = processes.wrap(model, place)
        self.steps_per_epoch = max(count // size, 1)
        self.batch, self.trouble = None, ""  # the next one, or why there is none
        self.waited = 0.0  # seconds without a batch, since the last line of the log
        order = order_of(count, size, place, options.seed, self.position)
        samples, on_gpu = Samples(images, view, options.seed, collate), place.device.type == "cuda"
        self.loaded = load(samples.batch, order, options.workers, self.stopped, on_gpu)
        self.held.callback(self.loaded.close)

    def batches(self) -> Iterator[Any]:
        """From where the run stands to its end, or to a pause."""
        if self.finished:
            self.ended = self.ended or "done"  # unless its test was stopped
        else:
            self.fetch()
            found = gather_objects((self.stopped(), bool(self.trouble)))
            self.ended = ending(*map(any, zip(*found)))
        while not self.ended:
            yield self.batch
            self.save_if_due()

    def fetch(self) -> None:
        """Have the next batch ready, on the device; none where the run is asked to stop."""
        began = time.perf_counter()
        try:
            batch, failures = next(self.loaded, (None, []))
            if failures and self.folder:
                name_skipped(self.folder / "skipped.txt", failures, len(self.images))
            # From pinned memory, so that no GPU waits for it
            move = partial(Tensor.to, device=self.place.device, non_blocking=True)
            self.batch = tree_map_only(Tensor, move, batch)
        except ValueError as error:
            self.trouble = str(error)
        self.waited += time.perf_counter() - began

    def remember(self) -> None:
        """Before a forward: keep what it moves, in case the step does not count."""
        for before, buffers in zip(self.before, self.buffers):
            torch._foreach_copy_(before, buffers)
        self.stage = "forward"

    def parts(self, *batch: Tensor) -> Iterator[list[Tensor]]:
        """The batch in --accumulate parts; only the last backward averages over the ranks."""
        share = len(batch[0]) // self.options.accumulate
        for i in range(self.options.accumulate):
            alone = self.network is self.model or i == self.options.accumulate - 1
            with contextlib.nullcontext() if alone else self.network.no_sync():
                yield [tensor[i * share : (i + 1) * share] for tensor in batch]

    def autocast(self) -> torch.autocast:
        """The run's precision."""
        dtype = self.place.dtype
        return torch.autocast(self.place.device.type, dtype, enabled=dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part's loss."""
        self.scaler.scale(loss / self.options.accumulate).backward()

    def agree(self, values: Tensor) -> bool:
        """Whether all numbers of all ranks are finite, so that the step may move the weights.

        values (n): this rank's, under the run's names. The next batch is fetched first, so that in
        the same exchange the ranks agree whether to stop: one was asked to, or has no next batch.
        Here the host waits for the device.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self.fetch()
        # Filled there: a copy from here would wait, too
        wanted = [norm.new_full((1,), flag) for flag in (self.stopped(), bool(self.trouble))]
        numbers = torch.cat([values.detach(), norm[None], *wanted])
        *sums, stop, trouble = sum_over_ranks(numbers).tolist()
        self.values = [total / self.place.world_size for total in sums]
        self.good = math.isfinite(sum(sums))
        self.ended = ending(stop, trouble)
        return self.good

    def stopped(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return bool(self.signals.received)

    def step(self, lr: float) -> None:
        """Move the weights. Until `end_step`, what else belongs to the step moves."""
        self.stage = "moving"
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def undo(self) -> None:
        """Return to what was remembered."""
        for before, buffers in zip(self.before, self.buffers if self.stage else ()):
            torch._foreach_copy_(buffers, before)
        self.stage = ""

    def end_step(self) -> None:
        """Count the batch, forget the gradient, and see whether the run ends here."""
        self.scaler.update()
        self.optimizer.zero_grad()
        self.stage = ""
        self.position += 1
        self.steps, self.bad_steps = self.steps + self.good, self.bad_steps + (not self.good)
        self.bad_in_row = 0 if self.good else self.bad_in_row + 1
        if self.good:
            self.bar.update()
            self.tell_time()
            self.sums = [a + b for a, b in zip(self.sums, self.values)]
        if self.bad_in_row >= MAX_BAD_STEPS:
            self.ended = "diverged"
        elif self.finished:
            self.ended = "done"

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.steps >= self.options.last_step

    def paused(self, total: int) -> bool:
        """Whether the run ended before its last step, and a line about it."""
        if self.steps >= total:
            return False
        left = self.time_left(total)
        then = f"{self.command('--max-steps')}{left and f', for {left}'}"
        self.print(f"paused   at step {self.steps} of {total}; {then}")
        return True

    def command(self, *without: str) -> str:
        """What goes on from last.pth, in words."""
        over = ["--resume none"] * (self.options.resume == "none")
        without = " and ".join([*without, *over])
        return f"the same command{f' without {without}' * bool(without)} goes on"

    def generator(self) -> torch.Generator:
        """Random numbers on the device for this batch and rank."""
        seed = seed_of(self.options.seed, self.position, self.place.rank)
        return torch.Generator(self.place.device).manual_seed(seed)

    def log_is_due(self) -> bool:
        """Every so many good steps, and after the first and the last."""
        due = self.steps % self.options.log_every == 0 or self.steps == 1 or self.finished
        return due and self.good

    def log(self, brief: Callable[[Mapping[str, Any]], str], **more: float) -> dict[str, Any]:
        """A line of log.jsonl, of the steps since the last one -> the line; more: of this step."""
        now, steps = time.perf_counter(), self.steps - self.logged
        timed = max(self.steps - self.timed, 1)
        self.images_per_second = timed * self.options.batch_size / (now - self.timed_at)
        record = dict(
            step=self.steps,
            epoch=round(self.position / self.steps_per_epoch, 4),
            **{name: total / steps for name, total in zip(self.names, self.sums)},
            images_per_second=self.images_per_second,
            data_seconds=self.waited / timed,
            memory_gb=processes.peak_memory_gb(self.place.device),
            skipped_steps=self.bad_steps,
            **more,
        )
        self.logged, self.sums, self.waited = self.steps, [0.0] * len(self.names), 0.0
        self.timed, self.timed_at, self.heard = self.steps, now, now
        left = self.time_left(self.options.last_step) if self.steps > 1 else ""
        self.write(record, brief(record) + (left and f"  {left} left"))
        return record

    def tell_time(self) -> None:
        """Where there is no bar: a line about the time that is left, after a while without one."""
        now, steps = time.perf_counter(), self.steps - self.timed
        silent = self.writes and self.bar.disable and not self.log_is_due()
        if silent and now > self.heard + log.OFTEN:
            self.images_per_second = steps * self.options.batch_size / (now - self.timed_at)
            left = self.time_left(self.options.last_step)
            log.say(f"step {self.steps}/{self.options.last_step}  {left} left")
            self.heard = now

    def leave_out(self, began: float) -> None:
        """The time since then, as of a test, is no time of a step."""
        self.timed_at += time.perf_counter() - began

    def time_left(self, step: int) -> str:
        """From here to a step, at the speed of the last line about a step; "" without one."""
        seconds = (step - self.steps) * self.options.batch_size / self.images_per_second
        return str(datetime.timedelta(seconds=round(seconds))) if seconds else ""

    def write(self, record: Mapping[str, Any], brief: str) -> None:
        """A line of log.jsonl, and the same for the eye. A full disk costs this line."""
        if not self.writes:
            return
        self.print(f"step {record['step']}/{self.options.last_step}  {brief}")
        try:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.say(f"could not write log.jsonl: {error.strerror}; the run goes on")

    def print(self, *lines: str) -> None:
        """Lines on stdout, from the main process."""
        if self.writes and lines:
            with tqdm.external_write_mode():  # above the bar
                print(log.fit("\n".join(lines), sys.stdout), flush=True)

    def open_folder(self, changed: Callable[[Mapping[str, Any]], list[str]]) -> None:
        """Take the folder, go on from its checkpoint, and open the log. Raises ValueError."""
        options, last = self.options, self.folder / "last.pth"
        wanted = options.resume != "none" and last.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.writes:
                self.held.enter_context(lock(self.folder))
            if wanted:
                self.resume(last, changed if options.resume != "force" else lambda saved: [])
            folder.require_space(self.folder, self.model, self.optimizer)
            # All have read last.pth then
            folder.require_agreement(self.folder, self.position, self.images, self.settings)
            if self.writes:
                if not wanted:
                    folder.begin_anew(self.folder, options.resume)
                self.clear_folder()
        except OSError as error:
            reason = "it is a file" if isinstance(error, FileExistsError) else error
            raise ValueError(f"--output-dir {self.folder} cannot be used: {reason}") from None
        if wanted:
            self.print(f"resumed  {last} after step {self.steps}")
            following = self.steps - self.steps % options.log_every + options.log_every
            going = f"a line at step {min(following, options.last_step)}"
            done = f"no step: {self.steps} are done; --resume none begins anew"
            self.print(f"next     {going if self.steps < options.last_step else done}")

    def clear_folder(self) -> None:
        """Of an earlier part of the run, what was lost and what would be taken for its end."""
        left = ["skipped.txt"] * (self.position == 0)  # a new run names its own
        left += ["backbone.pth", "result.json"] * (self.steps < self.options.last_step)
        for name in left:
            (self.folder / name).unlink(missing_ok=True)
        files.forget_after(self.folder / "log.jsonl", self.steps)
        files.remove_leftovers(self.folder)
        files.write_json(self.folder / "config.json", self.settings)

    def resume(self, path: Path, changed: Callable[[Mapping[str, Any]], list[str]]) -> None:
        """Go on from a checkpoint."""
        parts = self.model, self.optimizer, self.scaler
        saved = checkpoints.restore(path, *parts, changed)
        self.steps = saved["step"]
        for name in COUNTS:
            setattr(self, name, saved.get(name, getattr(self, name)))
        self.began -= saved["seconds"]
        then, now = saved["world_size"], self.place.world_size
        if then != now and self.writes:
            log.say(f"{then} process(es) then, {now} now: the same images, but not the same bits")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(
            format=checkpoints.FORMAT,
            config=self.settings,
            step=self.steps,
            num_images=len(self.images),
            world_size=self.place.world_size,
            seconds=self.seconds,
            **{name: getattr(self, name) for name in COUNTS},
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    @property
    def seconds(self) -> float:
        """Of the run so far, from the start of the program, its earlier parts included."""
        return time.perf_counter() - self.began

    def save_if_due(self) -> None:
        """After a step: last.pth by the clock and at the end, epoch_N.pth at its epoch."""
        epoch, every = self.position // self.steps_per_epoch, self.options.keep_every
        keep = every and epoch // every > self.kept // every
        late = time.perf_counter() - self.written >= 60 * self.options.save_minutes
        # After a bad step the checkpoint before it may be the better one
        if self.ended != "diverged" and (self.ended or (self.good and (late or keep))):
            self.kept = epoch
            self.save(f"epoch_{epoch:04d}.pth" if keep else "")

    def save(self, also: str = "") -> bool:
        """Write last.pth -> whether this process did; also: a second name, written before. A full
        disk costs a line, at the end the run.
        """
        self.written, done = time.perf_counter(), False
        for file in (self.folder / name for name in (also, "last.pth") if name and self.writes):
            try:
                checkpoints.save(file, self.state())
                done = True
            except OSError as error:
                line = f"could not write {file} after step {self.steps}: {error.strerror or error}"
                line += "; what stood there before is intact" * file.exists()
                if self.ended and file.name == "last.pth":
                    other = "copy an epoch_N.pth, if there is one, to last.pth, or begin anew"
                    line += f"; make room, then {self.command() if file.exists() else other}"
                    raise Stopped(line) from None
                log.say(f"{line}, and the run goes on")
                done = False
        return done

    def __enter__(self) -> "Run":
        self.held.enter_context(self.signals)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ended the loop, what was learned before the unfinished step is saved."""
        try:
            if kind and self.stage != "moving" and self.steps:
                self.undo()
                if self.save():
                    log.say(f"saved    {self.folder}/last.pth after step {self.steps}")
        finally:
            self.held.close()

    def end(self) -> int:
        """Says how the run ended, and leaves the other processes -> exit status. Raises Stopped
        where it could not go on.
        """
        if self.writes and (skipped := self.folder / "skipped.txt").exists():
            count = len(skipped.read_bytes().splitlines())
            self.print(f"skipped  {count} images since the run began could not be read: {skipped}")
        held = f"{self.folder}/last.pth holds step {self.steps}"
        held = held if self.steps else "no step was taken"
        if self.ended == "diverged":
            raise Stopped(
                f"{MAX_BAD_STEPS} steps in a row had no finite loss and gradient, and changed no "
                "weights. Go on with --amp off or a lower --base-lr, and --resume force"
            )
        if self.ended == "trouble":
            reason = self.trouble or "another process has no images, and says why"
            raise Stopped(f"{reason}; {held}")
        if self.ended == "signal":
            received = self.signals.received or "a signal to another process"
            line = f"stopped by {received} after step {self.steps} of {self.options.last_step}"
            self.print(f"{line}; {held}{f': {self.command()}' * bool(self.steps)}")
        if self.place.world_size > 1:
            torch.distributed.destroy_process_group()
        return 130 if (self.ended, self.signals.received) == ("signal", "SIGINT") else 0


def ending(stop: float, trouble: float) -> str:
    """How a run ends where so many ranks were asked to stop, or have no next batch."""
    return "signal" if stop else "trouble" if trouble else ""


def seed_of(*parts: int) -> int:
    """One random stream per (seed, position in the run, rank)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
