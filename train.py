"""Pretrain SlotCon: student, teacher, center and two losses, on toy scenes or on a folder of photographs.

    python train.py                                                  toy scenes, two minutes on a laptop
    python train.py --preset coco-r50 --data-dir COCO                the published recipe, one process
    torchrun --nproc-per-node=8 train.py --preset coco-r50 --data-dir COCO      the same on eight GPUs

Slide: "Together: solving segmentation & representation jointly". Paper: sections 3 and 4.1.
Differs: starts without a launcher; the two losses are normalized over all ranks (losses.py); a step whose loss or
gradient is not finite changes nothing; every random choice is a function of the seed and of the position in the run.
Read next: evaluate.py. Side trip: recipes.py, all numbers of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import recipes
import toy
from data import TwoCrops
from engine import checkpoint, files, keeper, loader, processes, weights
from engine.batches import Batches, run_batches
from engine.gradient import Gradient
from engine.images import ImageFiles, find_images
from engine.journal import Journal
from engine.keeper import Keeper
from engine.lars import make_optimizer
from engine.meter import Meter
from engine.program import Stopped, run_program
from engine.progress import Progress, seed_of
from engine.ranks import gather_rows
from engine.schedule import Schedule
from engine.undo import Undo
from engine.verdict import Verdict, agree
from measures import toy_result
from measures.course import brief, statistics
from photometric import Photometric
from recipes import Config
from slotcon import Report, SlotCon
from teacher import teacher_momentum


@dataclass
class Run:
    """The parts of a run; what each one owns stands in its file."""

    c: Config
    place: processes.Place
    folder: Path
    schedule: Schedule
    model: SlotCon
    gradient: Gradient
    undo: Undo
    progress: Progress
    batches: Batches
    photometric: Photometric
    meter: Meter
    journal: Journal
    keeper: Keeper
    num_images: int
    began: float  # on the clock of time.perf_counter, moved back by what the run took before it was interrupted

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(
            format=checkpoint.FORMAT, config=dataclasses.asdict(self.c), **self.progress.state(), **self.meter.state(),
            num_images=self.num_images, world_size=self.place.world_size, seconds=time.perf_counter() - self.began,
            model=self.model.state_dict(), optimizer=self.gradient.optimizer.state_dict(),
            scaler=self.gradient.scaler.state_dict())


def train(run: Run, signals: processes.StopSignals) -> None:
    """The whole run, from its first step or from where it was resumed, to the end or to a pause."""
    c, place, progress, schedule = run.c, run.place, run.progress, run.schedule
    generator = torch.Generator(place.device)
    while not progress.finished:
        batch = run.batches.next()
        generator.manual_seed(seed_of(c.seed, progress.position, place.rank))
        views = run.photometric(batch.views, generator)
        trouble = run.batches.trouble or run.keeper.trouble
        verdict, report = take_step(run, views, batch.boxes, batch.flipped, bool(signals.received), bool(trouble))

        progress.advance(verdict)
        if verdict.good:
            run.meter.add(verdict.values)
            run.journal.advance()
            end_of_epoch = progress.position % schedule.steps_per_epoch == 0
            if progress.step % c.log_every == 0 or end_of_epoch or progress.step == schedule.last_step:
                log(run, report)
        run.keeper.keep(progress, verdict.good, run.state)
    run.journal.close()


def take_step(
    run: Run, views: Tensor, boxes: Tensor, flipped: Tensor, stop: bool = False, trouble: bool = False
) -> tuple[Verdict, Report]:
    """One step on this rank's images: loss, gradient, and if all ranks agree, everything that moves.

    views (b v 3 y x) normalized, boxes (b v 4), flipped (b v) -> what all ranks agreed on, the report of the last part.
    """
    c, model, schedule, step = run.c, run.model, run.schedule, run.progress.step
    run.undo.remember()
    reports, norm = run.gradient.compute(views, boxes, flipped)
    losses = torch.stack([report.losses for report in reports]).mean(0)  # over the parts of the batch
    verdict = agree(torch.cat([losses, norm[None]]), stop, trouble)
    if verdict.good:
        run.gradient.step(schedule.learning_rate(step))
        model.update_center(torch.stack([report.center_mean for report in reports]).mean(0), c.momentum_center)
        model.update_teacher(momentum_after(c, schedule, step + 1))
    else:
        run.undo.undo()
    run.gradient.clear(scaled=not verdict.trouble)
    return verdict, reports[-1]


def momentum_after(c: Config, schedule: Schedule, steps: int) -> float:
    """The teacher's momentum once so many steps are taken."""
    return teacher_momentum(steps, schedule.total_steps, c.momentum_teacher, c.momentum_teacher_end)


def log(run: Run, report: Report) -> None:
    """A line of the log: means since the last one, and statistics of this step. All ranks call it."""
    c, progress, schedule = run.c, run.progress, run.schedule
    numbers = statistics(report, run.model.center, c.temp_teacher)
    means = run.meter.read(progress.step)
    record = dict(
        step=progress.step, epoch=round(progress.position / schedule.steps_per_epoch, 4), loss=means["loss"],
        group_loss=means["group_loss"], slot_loss=means["slot_loss"], lr=schedule.learning_rate(progress.step - 1),
        momentum_teacher=momentum_after(c, schedule, progress.step), **numbers, grad_norm=means["grad_norm"],
        images_per_second=means["images_per_second"],
        data_seconds=run.batches.waited_since() / means["steps_timed"],
        memory_gb=processes.peak_memory_gb(run.place.device), skipped_steps=progress.bad_steps)
    run.journal.write(record, brief(record))


def set_up(c: Config, given: set[str], at_end: contextlib.ExitStack) -> Run:
    """All parts of a run, new or resumed. Raises ValueError, with one line, for what the person can change."""
    began = time.perf_counter()
    if c.threads:
        torch.set_num_threads(c.threads)
    place = processes.start(c.device, c.timeout)
    device, folder, is_main = place.device, Path(c.output_dir), place.rank == 0
    dtype = processes.precision(c.amp, device)
    images, about = open_images(c, given)
    recipes.check_batch(c, place.world_size, len(images))
    schedule = recipes.schedule_of(c, len(images))

    model = make_model(c, place)
    optimizer = make_optimizer(c.optimizer, model.parameters(), schedule.peak, c.weight_decay)
    gradient = Gradient(model, optimizer, device, dtype, c.accumulate)
    progress = Progress(schedule.last_step, c.max_bad_steps)
    meter = Meter(("loss", "group_loss", "slot_loss", "grad_norm"), c.batch_size)
    last = folder / "last.pth" if c.resume == "auto" else Path(c.resume)
    if c.resume != "none" and (c.resume != "auto" or last.exists()):
        changed = functools.partial(recipes.differences, c, len(images))
        saved = checkpoint.restore(last, model, optimizer, gradient.scaler, changed)
        progress.restore(saved)
        meter.restore(saved)
        began -= saved["seconds"]
        if is_main:
            print(f"resumed  {last} after step {progress.step}"
                  + keeper.change_of_processes(saved["world_size"], place.world_size))
    positions = gather_rows(torch.tensor([progress.position], device=device), [1] * place.world_size)
    keeper.check_position(last, positions.tolist())
    if c.compile:
        for network in (model.student, model.teacher):
            network.backbone.compile()
            network.projector.compile()
    gradient.model = processes.wrap(model, place)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder, progress.step, schedule.last_step, is_main, c.tensorboard)
        if is_main:
            if progress.position == 0:  # a new run names its own
                (folder / "skipped.txt").unlink(missing_ok=True)
            files.remove_leftovers(folder)
            files.write_json(folder / "config.json", dataclasses.asdict(c))
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written to: {error.strerror or error}") from None
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    journal.print(f"device   {processes.describe(place)}, {half}\ndata     {about}")
    journal.print(recipes.describe(c, schedule, place.world_size, model))
    crops = TwoCrops(c.image_size, c.min_area, c.min_overlap, geometric=c.geometric)
    skipped = loader.Skipped(folder / "skipped.txt", len(images), c.max_bad_share)
    batches = run_batches(images, crops, c.batch_size, c.seed, progress.position, place, c.workers, skipped)
    at_end.callback(batches.close)  # whatever ends the run: workers ignore the signal Python would end them with
    photometric = Photometric(c.brightness, c.contrast, c.saturation, c.hue, c.p_jitter, c.p_gray, c.p_blur,
                              p_solarize=c.p_solarize, solarize_threshold=c.solarize_threshold)
    kept = Keeper(folder, schedule.steps_per_epoch, c.save_every, c.keep_every, c.keep_last,
                  c.on_save_error == "stop", is_main)
    undo = Undo(buffer for buffer in model.buffers() if buffer is not model.center)
    return Run(c, place, folder, schedule, model, gradient, undo, progress, batches, photometric, meter, journal, kept,
               len(images), began)


def make_model(c: Config, place: processes.Place) -> SlotCon:
    """The model with random weights, the same on every process, where and how it is trained."""
    torch.manual_seed(c.seed)
    names = inspect.signature(SlotCon).parameters
    model = SlotCon(**{name: getattr(c, name) for name in names}).to(place.device).train()
    if place.world_size > 1 and place.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on a CPU it raises
    channels_last = place.device.type == "cuda" if c.channels_last is None else c.channels_last
    return model.to(memory_format=torch.channels_last) if channels_last else model


def open_images(c: Config, given: set[str]) -> tuple[Sequence[Tensor], str]:
    """The training images, a sequence of uint8 tensors (3 y x), and a line that says what they are."""
    if c.dataset == "toy":
        return toy.ToyImages(c.seed, c.toy_scenes), f"{c.toy_scenes} toy scenes, drawn here"
    # A layout that was asked for by name must be there; a preset's layout may turn out to be any folder of images.
    root, paths, notice = find_images(c.data_dir, c.dataset, strict="dataset" in given)
    return ImageFiles(root, paths), f"{len(paths)} images: " + (notice or f"{c.data_dir}, layout {c.dataset}")


def finish(run: Run, signals: processes.StopSignals) -> None:
    """The end, or a pause: what is written last, and what is said. Raises Stopped where the run could not go on."""
    c, progress, last = run.c, run.progress, run.folder / "last.pth"
    if progress.ended == "diverged":
        raise Stopped(keeper.nothing_finite(progress.bad_in_row, run.gradient.dtype is not None, last))
    if run.batches.trouble or run.keeper.trouble or progress.ended == "trouble":
        raise Stopped(run.batches.trouble or run.keeper.trouble or "another process stopped the run, and says why")
    if progress.ended == "signal":
        run.journal.print(f"stopped by {signals.received or 'another process'} after step {progress.step} of "
                          f"{progress.last_step}; {last} is written, and {keeper.same_command(c.resume)} goes on from "
                          "there")
    elif run.place.rank == 0:
        backbone = run.folder / "backbone.pth"
        try:
            checkpoint.save(backbone, weights.backbone_state(run.model.state_dict()))
        except OSError as error:
            raise Stopped(f"could not write {backbone}: {error.strerror or error}; last.pth holds everything, and "
                          f"{keeper.same_command(c.resume)} tries again") from None
        print(f"done     {progress.step} steps; {backbone} is the teacher's trunk under torchvision's names")
        if c.dataset == "toy":
            toy_result.show(run.model.teacher, c.arch, c.num_prototypes, c.dim_hidden, c.dim_out, c.seed,
                            c.toy_test_scenes, run.folder, run.began)


def check_data(c: Config, given: set[str]) -> None:
    """--check-data: read everything once and report. Raises Stopped where a run would stop for it, ValueError."""
    if c.dataset == "toy":
        raise ValueError("--check-data reads photographs: give --data-dir, and a preset such as --preset coco-r50")
    images, about = open_images(c, given)
    print(about)
    bad = loader.report_check(images, processes.workers_of(c.workers))
    if bad > c.max_bad_share * len(images):
        raise Stopped(f"{bad} of {len(images)} images cannot be read, more than --max-bad-share {c.max_bad_share:g} "
                      "allows: a run would stop")


def start(argv: list[str] | None, prepared: Callable[[Run], None] | None = None) -> int:
    """From the command line to the end of the run, or to a pause."""
    c, given = recipes.parse(argv, __doc__)
    if c.check_data:
        check_data(c, given)
        return 0
    with processes.StopSignals() as signals, contextlib.ExitStack() as at_end:
        try:
            run = set_up(c, given, at_end)
            if prepared:
                prepared(run)
            train(run, signals)
            finish(run, signals)
        except RuntimeError as error:
            if not processes.lost(error):
                raise
            raise Stopped(keeper.lost_line(error, Path(c.output_dir), c.resume)) from None
    return 0


def main(argv: list[str] | None = None, prepared: Callable[[Run], None] | None = None) -> int:
    """prepared(run): called before the first step, for those who look on. Returns the exit status."""
    return run_program("train.py", functools.partial(start, prepared=prepared), argv)


if __name__ == "__main__":
    sys.exit(main())
