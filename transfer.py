"""Fine-tune a pretrained trunk: object detection with Mask R-CNN, semantic segmentation with an
FCN.

    python transfer.py segmentation --dataset toy --labeled 16 --backbone runs/toy/last.pth
    python transfer.py segmentation --dataset voc --data-dir VOCdevkit --backbone last.pth
    python transfer.py detection --data-dir COCO --backbone last.pth
    torchrun --nproc-per-node=8 transfer.py detection --data-dir COCO --backbone last.pth

The first takes a minute on a laptop; the others are table 2. docs/transfer.md has them all.

Slides: tables 2, 3, 4 and 7. Paper: section 4.2.
Differs: torchvision's parts and pycocotools on today's torch, where the paper used detectron2 and
mmsegmentation; the settings are the released ones (downstream/settings.py). Whatever a pretraining
survives, a fine-tuning does too: the loop is train.py's, and its parts are the same.
"""

from __future__ import annotations

import engine.interrupt  # noqa: F401  first: Ctrl-C while the others are loaded

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbone import RESNETS
from downstream import datasets, scores, settings, trunks
from downstream.settings import Shared
from downstream.tasks import Task, make_task
from engine import checkpoint, files, options, processes
from engine.journal import say
from engine.program import Stopped, run_program
from engine.progress import seed_of
from engine.ranks import copy_from_main, gather_objects
from engine.run import Run, live, open_run
from engine.signals import StopSignals
from engine.verdict import Verdict, agree


def train(c: Shared, task: Task, run: Run, signals: StopSignals) -> None:
    """From the first step, or from where the run was resumed, to the end or to a pause."""
    progress = run.progress
    if test_is_due(c, run) or result_is_lost(run):  # the run was interrupted while it was tested
        test(c, task, run)
    while not progress.finished:
        batch = run.batches.next()  # never raises: trouble travels to the verdict
        # dropout and the sampling of proposals
        torch.manual_seed(seed_of(c.seed, progress.position, run.place.rank))
        verdict = take_step(run, batch, bool(signals.received), bool(run.trouble))
        progress.advance(verdict)
        if verdict.good:
            run.meter.add(verdict.values)
            run.journal.advance()
            if progress.step % c.log_every == 0 or progress.step == progress.last_step:
                log(task, run)
        run.keeper.keep(progress, verdict.good, run.state)
        if verdict.good and test_is_due(c, run) and progress.ended != "signal":
            test(c, task, run)


def take_step(run: Run, batch: Sequence[Any], stop: bool = False, trouble: bool = False) -> Verdict:
    """One step on this rank's images: loss, gradient, and where all ranks agree, the weights move.

    batch: images and what is known about them, as the model takes them; stop, trouble: what this
    rank wants -> what all ranks agreed on.
    """
    run.undo.remember()
    reports, norm = run.gradient.compute(*batch)
    losses = torch.stack(reports).mean(dim=0)  # over the parts
    verdict = agree(torch.cat([losses, norm[None]]), stop, trouble)
    if verdict.good:
        run.gradient.step(run.schedule.learning_rate(run.progress.step))
        run.undo.forget()
    else:
        run.undo.undo()
    run.gradient.clear(scaled=not verdict.trouble)
    return verdict


def log(task: Task, run: Run) -> None:
    """A line of the log: means since the last one."""
    step = run.progress.step
    means = run.meter.read(step)
    waited = run.batches.waited_since() / means.pop("steps_timed")
    record = dict(
        step=step,
        lr=run.schedule.learning_rate(step - 1),
        **means,
        data_seconds=waited,
        memory_gb=processes.peak_memory_gb(run.place.device),
        skipped_steps=run.progress.bad_steps,
    )
    parts = [f"{name.removesuffix('_loss')} {record[name]:.3f}" for name in task.losses]
    run.journal.write(record, "  ".join([*parts, f"{record['images_per_second']:.1f} images/s"]))


def test_is_due(c: Shared, run: Run) -> bool:
    """Whether the weights as they stand are to be scored, and have not been."""
    step = run.progress.step
    asked = c.test_every > 0 and step > 0 and step % c.test_every == 0
    return (asked or step >= run.schedule.last_step) and run.notes.get("tested", 0) < step


def result_is_lost(run: Run) -> bool:
    """Whether a finished run has no result.json: another folder goes on from it, or the disk was
    full. Asked on all ranks; the main process's folder counts."""
    return run.progress.finished and gather_objects(read_result(run) is None)[0]


def read_result(run: Run) -> dict[str, Any] | None:
    """What result.json says of the last test, None where it is missing, damaged or older."""
    try:
        result = json.loads((run.folder / "result.json").read_text())
        return result if result["step"] == run.notes.get("tested") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def test(c: Shared, task: Task, run: Run) -> None:
    """Score the weights; all ranks share the images. The best are kept, and that it was done."""
    place, model = run.place, run.model
    copy_from_main(model.buffers())  # without SyncBN each rank has its own, and the main's are kept
    model.eval()
    dtype = run.gradient.dtype
    with torch.autocast(place.device.type, dtype, enabled=dtype is not None):
        numbers, details = task.judge(
            task.test, place.device, place.rank, place.world_size, processes.workers_of(c.workers)
        )
    model.train()
    numbers = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    record = dict(step=run.progress.step, **numbers)
    shown = [f"{name} {value:.4f}" for name, value in numbers.items() if value is not None]
    run.journal.write(record, "  ".join(shown))
    score = numbers[task.score] or 0.0
    better = score > run.notes.get("best", -1.0)
    # A run that goes on in another folder left its best weights in the first one.
    keep = better or (score == run.notes["best"] and not (run.folder / "best.pth").exists())
    run.notes.update(tested=run.progress.step, best=score if better else run.notes["best"])
    if place.rank == 0:
        write_result(c, run, {**record, **details}, keep)
        run.keeper.write(run.state(), final=run.progress.finished)


def write_result(c: Shared, run: Run, result: dict[str, Any], best: bool) -> None:
    """result.json, and best.pth where the weights are the best so far. A full disk is said."""
    try:
        files.write_json(run.folder / "result.json", result)
        if best:
            kept = dict(config=dataclasses.asdict(c), result=result, model=run.model.state_dict())
            checkpoint.save(run.folder / "best.pth", kept)
    except OSError as error:
        reason = error.strerror or error
        say(f"could not write best.pth or result.json: {reason}; the run goes on")


def set_up(c: Shared, given: set[str]) -> tuple[Shared, Task, Run]:
    """The configuration with the file's architecture, the task, and all parts of a run, new or
    resumed. Raises ValueError for what the person can change.
    """
    if c.threads:
        torch.set_num_threads(c.threads)
    place = processes.start(c.device, c.timeout)
    dtype = processes.precision(c.amp, place.device)
    torch.manual_seed(c.seed)  # the same heads on every rank
    arch = c.arch if c.backbone == "random" or "arch" in given else ""
    trunk, arch, about = trunks.open_trunk(c.backbone, arch, c.network)
    c = dataclasses.replace(c, arch=arch)
    if arch not in RESNETS and hasattr(c, "output_stride") and "output_stride" not in given:
        c = dataclasses.replace(c, output_stride=0)  # only a ResNet can be given another one
    task = make_task(c, trunk)
    settings.check(c, place.world_size, len(task.train))
    workers = processes.workers_of(c.workers)
    scores.refuse_unusable(task.test, place.rank, place.world_size, workers)
    schedule = settings.schedule_of(c)
    torch.backends.cudnn.benchmark = not task.sizes_vary
    model = task.model.to(place.device).train()
    if place.world_size > 1 and place.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on a CPU it raises
    optimizer = torch.optim.SGD(task.groups, schedule.peak, c.momentum)
    run = open_run(
        settings.run_options(c), place, dtype, schedule, model, optimizer, task.train,
        view=task.view, values=(*task.losses, "grad_norm"), settings=settings.kept(c),
        changed=functools.partial(settings.differences, c, len(task.train)),
        touched=list(model.buffers()), black=task.black, collate=task.collate,
    )  # fmt: skip
    run.gradient.model = processes.wrap(model, place)
    run.journal.print(f"device   {processes.describe(place, dtype)}\ntrunk    {about}")
    run.journal.print(f"data     {len(task.train)} images to learn from, {len(task.test)} to test")
    if task.notice:
        run.journal.print(f"classes  {task.notice}")
    run.journal.print(settings.describe(c, schedule, place.world_size))
    return c, task, run


def finish(c: Shared, task: Task, run: Run) -> None:
    """What a run leaves, beside the slides' numbers. Raises Stopped without a result."""
    result = read_result(run)
    if result is None:
        raise Stopped(
            f"the run is done, but {run.folder / 'result.json'} could not be written: the scores "
            "are in log.jsonl, and the same command tests again"
        )
    best = 100 * run.notes["best"]
    print(f"done     {run.progress.step} steps; {len(task.test)} images of {c.dataset}, "
          f"{c.test_on}; best {task.score} of all tests {best:.2f} %")  # fmt: skip
    whole = c.test_on == "val" and not c.labeled
    targets = settings.TARGETS.get(c.dataset, {}) if whole else {}
    for name, (scratch, target) in targets.items():
        print(f"         {name:<10}{100 * (result[name] or 0):6.2f} %   the slides: {target} "
              f"pretrained on COCO, {scratch} from random weights")  # fmt: skip
    print(json.dumps(result))


def parse(argv: list[str] | None) -> tuple[Shared, set[str]]:
    """The command line -> configuration, and the names of the options given. Raises ValueError."""
    look = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = options.Parser("transfer.py", description=__doc__, **look)
    commands = parser.add_subparsers(dest="task", required=True, metavar="detection | segmentation")
    tasks = dict(detection=settings.DETECTION, segmentation=settings.SEGMENTATION)
    for name, text in (
        ("detection", "boxes and masks with Mask R-CNN: AP of COCO"),
        ("segmentation", "a class for every pixel with an FCN: mean IoU"),
    ):
        command = commands.add_parser(name, help=text, description=text, **look)
        options.add_options(command, tasks[name], by="dataset")
    args = parser.parse_args(argv)
    c, given = options.settle(tasks[args.task], args, by="dataset")
    if c.dataset != "toy" and not c.data_dir:
        raise ValueError(f"--data-dir is missing: the folder of {c.dataset}, which holds "
                         f"{datasets.TREES[c.dataset]}")  # fmt: skip
    places = {name: str(Path(getattr(c, name)).expanduser()) if getattr(c, name) else ""
              for name in ("data_dir", "backbone", "output_dir")}  # fmt: skip
    places["output_dir"] = places["output_dir"] or f"runs/{args.task}-{c.dataset}"
    return dataclasses.replace(c, **places), given


def start(argv: list[str] | None, prepared: Callable[[Run], None] | None = None) -> int:
    """From the command line to the end of the run, or to a pause."""
    c, given = parse(argv)
    made: list[Any] = []  # the settings as the data set completes them, and the task

    def opened() -> Run:
        *made[:], run = set_up(c, given)
        return run

    return live(
        c.output_dir,
        c.resume,
        set_up=opened,
        loop=lambda run, signals: train(*made, run, signals),
        finish=lambda run: finish(*made, run),
        prepared=prepared,
    )


def main(argv: list[str] | None = None, prepared: Callable[[Run], None] | None = None) -> int:
    """prepared(run): called before the first step, to look on. Returns the exit status."""
    return run_program("transfer.py", functools.partial(start, prepared=prepared), argv)


if __name__ == "__main__":
    sys.exit(main())
