"""Fine-tune a pretrained trunk: object detection with Mask R-CNN, semantic segmentation with an FCN.

    python transfer.py segmentation --dataset toy --labelled 16 --backbone runs/toy/last.pth      a minute on a laptop
    python transfer.py segmentation --dataset voc --data-dir VOCdevkit --backbone last.pth        table 3
    python transfer.py detection --data-dir COCO --backbone last.pth                              table 2
    torchrun --nproc-per-node=8 transfer.py detection --data-dir COCO --backbone last.pth         on eight GPUs

Slides: tables 2, 3, 4 and 7. Paper: section 4.2.
Differs: torchvision's parts and pycocotools on today's torch, where the paper used detectron2 and mmsegmentation;
the settings are the released ones (downstream/settings.py). Whatever a run survives, so does this one: the loop is
train.py's, and its pieces are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from downstream import datasets, detection, scores, segmentation, settings, trunks, views
from downstream.schedules import FineTuning
from engine import checkpoint, files, keeper, loader, options, processes
from engine.batches import Batches, run_batches
from engine.gradient import Gradient
from engine.journal import Journal, say
from engine.keeper import Keeper
from engine.meter import Meter
from engine.program import Stopped, run_program
from engine.progress import Progress, seed_of
from engine.ranks import copy_from_main, gather_rows
from engine.undo import Undo
from engine.verdict import Verdict, agree


@dataclass(frozen=True)
class Task:
    """What differs between the two tasks."""

    train: Any  # labelled images to learn from: a sequence of pairs
    test: Any  # and those that the scores are of
    view: Callable  # what a step sees of a pair
    collate: Callable  # what makes a batch of it
    blank: Any  # a pair for a rank that has none
    model: nn.Module
    groups: list[dict]  # for the optimizer
    losses: tuple[str, ...]  # names of what the model reports
    judge: Callable  # (test images, device, rank, world size, workers) -> scores, details
    score: str  # the one that decides which weights are the best
    sizes_vary: bool  # from step to step


@dataclass
class Run:
    """The parts of a run; what each one owns stands in its file."""

    c: settings.Shared
    place: processes.Place
    folder: Path
    schedule: FineTuning
    task: Task
    gradient: Gradient
    undo: Undo
    progress: Progress
    batches: Batches
    meter: Meter
    journal: Journal
    keeper: Keeper
    began: float  # on the clock of time.perf_counter, moved back by what the run took before it was interrupted
    tested: int = 0  # the step of the last test
    best: float = -1.0  # the best score so far

    @property
    def test_is_due(self) -> bool:
        step, every = self.progress.step, self.c.test_every
        due = step >= self.schedule.last_step or (every > 0 and step > 0 and step % every == 0)
        return due and self.tested < step

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(
            format=checkpoint.FORMAT, task=type(self.c).__name__.lower(), config=dataclasses.asdict(self.c),
            **self.progress.state(), **self.meter.state(), tested=self.tested, best=self.best,
            num_images=len(self.task.train), world_size=self.place.world_size,
            seconds=time.perf_counter() - self.began, model=self.task.model.state_dict(),
            optimizer=self.gradient.optimizer.state_dict(), scaler=self.gradient.scaler.state_dict())


def train(run: Run, signals: processes.StopSignals) -> None:
    """The whole run, from its first step or from where it was resumed, to the end or to a pause."""
    c, progress = run.c, run.progress
    if run.test_is_due:  # it was interrupted while it was tested
        test(run)
    while not progress.finished:
        batch = run.batches.next()
        torch.manual_seed(seed_of(c.seed, progress.position, run.place.rank))  # of dropout and sampled proposals
        trouble = run.batches.trouble or run.keeper.trouble
        verdict = take_step(run, batch, bool(signals.received), bool(trouble))

        progress.advance(verdict)
        if verdict.good:
            run.meter.add(verdict.values)
            run.journal.advance()
            if progress.step % c.log_every == 0 or progress.finished:
                log(run)
        run.keeper.keep(progress, verdict.good, run.state)
        if verdict.good and run.test_is_due and progress.ended != "signal":
            test(run)
    run.journal.close()


def take_step(run: Run, batch: Sequence[Any], stop: bool = False, trouble: bool = False) -> Verdict:
    """One step on this rank's (images, labels): loss, gradient, and if all ranks agree, the weights move."""
    run.undo.remember()
    reports, norm = run.gradient.compute(*batch)
    losses = torch.stack(reports).mean(0)  # over the parts of the batch
    verdict = agree(torch.cat([losses, norm[None]]), stop, trouble)
    if verdict.good:
        run.gradient.step(run.schedule.learning_rate(run.progress.step))
    else:
        run.undo.undo()
    run.gradient.clear(scaled=not verdict.trouble)
    return verdict


def log(run: Run) -> None:
    """A line of the log: means since the last one."""
    step, means = run.progress.step, run.meter.read(run.progress.step)
    timed = means.pop("steps_timed")
    record = dict(step=step, lr=run.schedule.learning_rate(step - 1), **means,
                  data_seconds=run.batches.waited_since() / timed,
                  memory_gb=processes.peak_memory_gb(run.place.device), skipped_steps=run.progress.bad_steps)
    parts = "  ".join(f"{name.removesuffix('_loss')} {record[name]:.3f}" for name in run.task.losses)
    run.journal.write(record, f"{parts}  {record['images_per_second']:.1f} images/s")


def test(run: Run) -> None:
    """Score the weights as they stand; all ranks share the images. Keeps the best, and writes down that it was done."""
    task, place, model = run.task, run.place, run.task.model
    copy_from_main(model.buffers())  # without SyncBN each rank has its own statistics, and the main one's are kept
    model.eval()
    with torch.autocast(place.device.type, run.gradient.dtype, enabled=run.gradient.dtype is not None):
        numbers, details = task.judge(task.test, place.device, place.rank, place.world_size,
                                      processes.workers_of(run.c.workers))
    model.train()
    step, score = run.progress.step, numbers[task.score]
    record = dict(step=step, **{name: None if math.isnan(value) else value for name, value in numbers.items()})
    run.journal.write(record, "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    run.tested = step
    better = score > run.best or (run.best < 0 and math.isnan(score))
    run.best = score if better else run.best
    if place.rank > 0:
        return
    try:
        files.write_json(run.folder / "result.json", {**record, **details})
        if better:
            config = dataclasses.asdict(run.c)
            checkpoint.save(run.folder / "best.pth", dict(config=config, **record, model=model.state_dict()))
    except OSError as error:
        say(f"could not write best.pth or result.json: {error.strerror or error}; the run goes on")
    run.keeper.write(run.state(), final=run.progress.finished)


# ------------------------------------------------------------------------------------ the two tasks


def make_detection(c: settings.Detection, trunk: nn.Module) -> Task:
    """Mask R-CNN on COCO's objects: table 2. Raises ValueError for a wrong tree."""
    seen = datasets.CocoObjects(c.data_dir, "train", trained=True)
    seen = seen.subset(datasets.some_of(len(seen), c.labelled, c.seed))
    unseen = seen if c.test_on == "train" else datasets.CocoObjects(c.data_dir, "val", trained=False)
    network = detection.mask_rcnn(trunk, len(seen.categories), c.test_short, c.longest, c.smallest_anchor, c.regions)
    model = detection.Detector(network)
    return Task(
        datasets.Training(seen), unseen, views.ObjectView(settings.shorts(c), c.longest), views.objects,
        views.blank_objects(), model, detection.parameter_groups(model, c.weight_decay), detection.LOSSES,
        functools.partial(scores.coco_precision, model.predict), "box_ap", sizes_vary=True)


def make_segmentation(c: settings.Segmentation, trunk: nn.Module) -> Task:
    """An FCN on labelled images: tables 3 and 4. Raises ValueError for a wrong tree."""
    seen = datasets.open_segmentation(c.dataset, c.data_dir, "train", c.train_list, c.scenes)
    seen = seen.subset(datasets.some_of(len(seen), c.labelled, c.seed))
    unseen = seen if c.test_on == "train" else datasets.open_segmentation(c.dataset, c.data_dir, "val")
    model = segmentation.Segmenter(trunk, len(seen.class_names), c.output_stride, c.head_width, c.head_convs,
                                   c.head_dilation, c.head_concat, c.dropout, c.aux_weight)
    frame = c.frame if c.frame[0] else ()
    view = views.CropView(c.crop, frame, c.scale, c.most, c.distort)
    predict = functools.partial(segmentation.predict, model, scale=frame, window=c.window, stride=c.window_stride)
    groups = [dict(params=list(model.parameters()), weight_decay=c.weight_decay)]
    return Task(
        datasets.Training(seen), unseen, view, loader.collate, views.blank_pixels(), model, groups,
        segmentation.LOSSES, functools.partial(scores.mean_iou, predict), "miou", sizes_vary=False)


MAKE = {settings.Detection: make_detection, settings.Segmentation: make_segmentation}


# ------------------------------------------------------------------------------------ a run


def set_up(c: settings.Shared, given: set[str], at_end: contextlib.ExitStack) -> Run:
    """All parts of a run, new or resumed. Raises ValueError, with one line, for what the person can change."""
    began = time.perf_counter()
    if c.threads:
        torch.set_num_threads(c.threads)
    place = processes.start(c.device, c.timeout)
    device, folder, is_main = place.device, Path(c.output_dir), place.rank == 0
    dtype = processes.precision(c.amp, device)
    torch.manual_seed(c.seed)  # the same heads on every process
    arch = c.arch if c.backbone == "random" or "arch" in given else ""
    trunk, arch, about = trunks.open_trunk(c.backbone, arch, c.network)
    c = dataclasses.replace(c, arch=arch)
    task = MAKE[type(c)](c, trunk)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not task.sizes_vary
    settings.check(c, place.world_size, len(task.train))
    schedule = settings.schedule_of(c)

    model = task.model.to(device).train()
    if place.world_size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on a CPU it raises
    optimizer = torch.optim.SGD(task.groups, schedule.peak, c.momentum)
    gradient = Gradient(model, optimizer, device, dtype, c.accumulate)
    progress = Progress(schedule.last_step, c.max_bad_steps)
    meter = Meter((*task.losses, "grad_norm"), c.batch_size)
    tested, best = 0, -1.0
    last = folder / "last.pth" if c.resume == "auto" else Path(c.resume)
    if c.resume != "none" and (c.resume != "auto" or last.exists()):
        changed = functools.partial(settings.differences, c, len(task.train))
        saved = checkpoint.restore(last, model, optimizer, gradient.scaler, changed)
        progress.restore(saved)
        meter.restore(saved)
        tested, best = saved["tested"], saved["best"]
        began -= saved["seconds"]
        if is_main:
            print(f"resumed  {last} after step {progress.step}"
                  + keeper.change_of_processes(saved["world_size"], place.world_size))
    positions = gather_rows(torch.tensor([progress.position], device=device), [1] * place.world_size)
    keeper.check_position(last, positions.tolist())
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
    journal.print(f"device   {processes.describe(place)}, {half}\ntrunk    {about}\n"
                  f"data     {len(task.train)} images to learn from, {len(task.test)} to test on")
    journal.print(settings.describe(c, schedule, place.world_size))
    skipped = loader.Skipped(folder / "skipped.txt", len(task.train), c.max_bad_share)
    batches = run_batches(task.train, task.view, c.batch_size, c.seed, progress.position, place, c.workers, skipped,
                          task.blank, task.collate)
    at_end.callback(batches.close)  # whatever ends the run: workers ignore the signal Python would end them with
    kept = Keeper(folder, c.save_every, stop_on_error=c.on_save_error == "stop", is_main=is_main)
    return Run(c, place, folder, schedule, task, gradient, Undo(model.buffers()), progress, batches, meter, journal,
               kept, began, tested, best)


def finish(run: Run, signals: processes.StopSignals) -> None:
    """The end, or a pause: what is said last. Raises Stopped where the run could not go on."""
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
        result = json.loads((run.folder / "result.json").read_text())
        print(f"done     {progress.step} steps, {len(run.task.test)} images of {c.dataset} ({c.test_on}); best "
              f"{run.task.score} of all tests {100 * run.best:.2f}")
        for name, (scratch, target) in settings.TARGETS.get(c.dataset, {}).items():
            print(f"         {name:<10} {100 * (result[name] or 0):6.2f} %   the slides: {target} pretrained on COCO, "
                  f"{scratch} from random weights")
        print(json.dumps(result))


def parse(argv: list[str] | None) -> tuple[settings.Shared, set[str]]:
    """The command line -> configuration, and the names of the options given. Raises ValueError with one line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = options.Parser("transfer.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(dest="task", required=True, metavar="detection | segmentation")
    tasks = dict(detection=settings.DETECTION, segmentation=settings.SEGMENTATION)
    for name, text in (("detection", "boxes and masks with Mask R-CNN, AP of COCO"),
                       ("segmentation", "a class for every pixel with an FCN, mean IoU")):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        options.add_options(command, tasks[name], by="dataset")
    args = parser.parse_args(argv)
    c, given = options.settle(tasks[args.task], args, by="dataset")
    if c.dataset != "toy" and not c.data_dir:
        raise ValueError(f"--data-dir is missing: the folder of {c.dataset}, which holds {datasets.TREES[c.dataset]}")
    data_dir = str(Path(c.data_dir).expanduser()) if c.data_dir else ""
    backbone = c.backbone if c.backbone == "random" else str(Path(c.backbone).expanduser())
    output_dir = c.output_dir or f"runs/{args.task}-{c.dataset}"
    return dataclasses.replace(c, data_dir=data_dir, backbone=backbone, output_dir=output_dir), given


def main(argv: list[str] | None = None, prepared=None) -> int:
    """prepared(run): called before the first step, for those who look on. Returns the exit status."""
    c, given = parse(argv)
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


if __name__ == "__main__":
    sys.exit(run_program("transfer.py", main))
