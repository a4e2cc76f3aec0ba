"""Pretrain SlotCon: student, teacher, center and two losses, on toy scenes or on a folder of
photographs.

    python train.py                                                   toy scenes, three minutes
    python train.py --preset coco-r50 --data-dir COCO                 the published recipe
    torchrun --nproc-per-node=8 train.py --preset coco-r50 --data-dir COCO      on eight GPUs
    python train.py --preset coco-r50 --plan --plan-processes 8       what such a run would need

Slide: "Together: solving segmentation & representation jointly".
Paper: sections 3 and 4.1.
Differs: starts without a launcher; the two losses are normalized over all ranks (losses.py); a step
whose loss or gradient is not finite changes nothing; every random choice is a function of the seed
and of the position in the run.
Read next: evaluate.py. Side trip: recipes.py, all numbers of a run.
"""

from __future__ import annotations

import engine.interrupt  # noqa: F401  first: Ctrl-C while the others are loaded

import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import planning
import recipes
import regroup
from backbone import RESNETS
from engine import checkpoint, files, loader, processes, weights
from engine.images import digest_of
from engine.keeper import same_command
from engine.lars import make_optimizer
from engine.program import Stopped, run_program
from engine.progress import seed_of
from engine.run import Run, live, open_run
from engine.signals import StopSignals
from engine.verdict import Verdict, agree
from measures import photos_result, toy_result
from measures.course import brief, statistics
from measures.health import Sizes
from measures.watch import Watch
from photometric import normalize
from recipes import Config
from slotcon import Report
from teacher import teacher_momentum

VALUES = ("loss", "group_loss", "slot_loss", "grad_norm")  # what every step adds to the log


def train(c: Config, run: Run, signals: StopSignals) -> None:
    """From the first step, or from where the run was resumed, to the end or to a pause."""
    progress, schedule = run.progress, run.schedule
    photometric = recipes.photometric_of(c)
    generator = torch.Generator(run.place.device)
    watch, regroupings = watch_of(c, run), recipes.regroup_positions(c, schedule)
    while not progress.finished:
        if progress.position in regroupings:
            start_groups_anew(c, run)
        batch = run.batches.next()  # never raises: trouble travels to the verdict
        generator.manual_seed(seed_of(c.seed, progress.position, run.place.rank))
        views = photometric(batch.views, generator)
        run.model.temp_teacher = recipes.teacher_temperature(c, schedule, progress.step)
        verdict, report = take_step(
            c, run, views, batch.boxes, batch.flipped, bool(signals.received), bool(run.trouble)
        )
        progress.advance(verdict)
        if verdict.good:
            run.meter.add(verdict.values)
            run.journal.advance()
            run.journal.remark(watch.first_steps(report, batch.boxes, batch.flipped))
            if schedule.is_logged(progress.step, progress.position, c.log_every):
                run.journal.remark(watch.line_of_log(log(c, run, report)))
        run.keeper.keep(progress, verdict.good, run.state)


def start_groups_anew(c: Config, run: Run) -> None:
    """--group-starts: a new start for all but the backbones. All ranks call it."""
    images = normalize(recipes.regroup_images(c).to(run.place.device))
    count = min(c.group_clusters, c.num_prototypes)
    seed = seed_of(c.seed, run.progress.position)
    regroup.start_groups_anew(run.model, run.gradient.optimizer, images, count, seed)
    run.journal.remark([f"regroup  new projector, predictor and prototypes; {count} prototypes "
                        "start in clusters of the trunk's features"])


def take_step(
    c: Config, run: Run, views: Tensor, boxes: Tensor, flipped: Tensor, stop: bool = False,
    trouble: bool = False,
) -> tuple[Verdict, Report]:  # fmt: skip
    """One step on this rank's images: loss, gradient, and where all ranks agree, all that moves.

    views (b v 3 y x) normalized, boxes (b v 4), flipped (b v); stop, trouble: what this rank wants
    -> what all ranks agreed on, and the report of the last part of the batch.
    """
    run.undo.remember()
    reports, norm = run.gradient.compute(views, boxes, flipped)
    losses = torch.stack([report.losses for report in reports]).mean(dim=0)  # over the parts
    verdict = agree(torch.cat([losses, norm[None]]), stop, trouble)
    if verdict.good:
        run.gradient.step(run.schedule.learning_rate(run.progress.step))
        center_mean = torch.stack([report.center_mean for report in reports]).mean(dim=0)
        run.model.update_center(center_mean, c.momentum_center)
        run.model.update_teacher(momentum_after(c, run, run.progress.step + 1))
        run.undo.forget()
    else:
        run.undo.undo()
    run.gradient.clear(scaled=not verdict.trouble)
    return verdict, reports[-1]


def momentum_after(c: Config, run: Run, steps: int) -> float:
    """The teacher's momentum once so many steps are taken."""
    total = run.schedule.total_steps
    return teacher_momentum(steps, total, c.momentum_teacher, c.momentum_teacher_end)


def watch_of(c: Config, run: Run) -> Watch:
    """What says in one line each why this run cannot learn, or does not."""
    schedule, step = run.schedule, run.progress.step
    side = -(-c.image_size // run.model.student.backbone.stride)
    sizes = Sizes(c.num_prototypes, schedule.warmup_steps, schedule.total_steps, side * side)
    temp_teacher = recipes.teacher_temperature(c, schedule, step)
    records = run.journal.records()
    return Watch(sizes, c.temp_student, temp_teacher, run.notes, step == 0, records)


def log(c: Config, run: Run, report: Report) -> dict[str, float]:
    """A line of the log: means since the last one, statistics of this step. All ranks call it."""
    progress = run.progress
    numbers = statistics(report, run.model.center, run.model.temp_teacher)
    means = run.meter.read(progress.step)
    waited = run.batches.waited_since() / means.pop("steps_timed")
    grad_norm, speed = means.pop("grad_norm"), means.pop("images_per_second")
    record = dict(
        step=progress.step,
        epoch=round(progress.position / run.schedule.steps_per_epoch, 4),
        **means,
        lr=run.schedule.learning_rate(progress.step - 1),
        momentum_teacher=momentum_after(c, run, progress.step),
        **numbers,
        grad_norm=grad_norm,
        images_per_second=speed,
        data_seconds=waited,
        memory_gb=processes.peak_memory_gb(run.place.device),
        skipped_steps=progress.bad_steps,
    )
    run.journal.write(record, brief(record))
    return record


def set_up(c: Config, given: set[str]) -> Run:
    """All parts of a run, new or resumed. Raises ValueError for what the person can change."""
    if c.threads:
        torch.set_num_threads(c.threads)
    place = processes.start(c.device, c.timeout)
    dtype = processes.precision(c.amp, place.device)
    images, about = recipes.images_of(c, strict="dataset" in given)
    recipes.check_batch(c, place.world_size, len(images))
    schedule = recipes.schedule_of(c, len(images))
    model = recipes.model_of(c, place.device, synchronized=place.world_size > 1)
    started = weights.start_from(model, c.init) if c.init else "random weights"
    optimizer = make_optimizer(c.optimizer, model.parameters(), schedule.peak, c.weight_decay)
    names = getattr(images, "paths", [])  # toy scenes have none
    digest = digest_of(names)
    run = open_run(
        recipes.run_options(c), place, dtype, schedule, model, optimizer, images,
        view=recipes.crops_of(c), values=VALUES, settings=dataclasses.asdict(c),
        changed=functools.partial(recipes.differences, c, len(images), digest),
        touched=[buffer for buffer in model.buffers() if buffer is not model.center],
    )  # fmt: skip
    run.notes["images"] = digest
    if c.held_out and c.dataset != "toy" and "held_out" not in run.notes:
        run.notes["held_out"] = recipes.held_out_images(c).paths.tolist()
    if c.subset and place.rank == 0:
        files.write_lines(run.folder / "subset.txt", names)
    if c.compile:
        recipes.compile_networks(model)
    run.gradient.model = processes.wrap(model, place)
    say = run.journal.print
    say(f"device   {processes.describe(place, dtype)}\ndata     {about}")
    say(recipes.describe(c, schedule, place.world_size, model))
    say(f"start    {started}" if not run.progress.position else "start    where it stopped")
    say(f"disk     {run.keeper.space(run.checkpoint_bytes(), schedule.epochs)}")
    for doubt in recipes.doubts(c, schedule, place.world_size):
        say(f"warning  {doubt}")
    return run


def finish(c: Config, run: Run) -> None:
    """What a run leaves: the teacher's trunk for others, and a look at what was found."""
    file = run.folder / "backbone.pth"
    try:
        checkpoint.save(file, weights.backbone_state(run.model.state_dict()))
    except OSError as error:
        raise Stopped(
            f"could not write {file}: {error.strerror or error}; last.pth holds everything, and "
            f"{same_command(c.resume)} tries again"
        ) from None
    names = "torchvision's names" if c.arch in RESNETS else f"names of the trunk {c.arch}"
    print(f"done     {run.progress.step} steps; {file} is the teacher's trunk under {names}")
    seconds, teacher = time.perf_counter() - run.began, run.model.teacher
    if c.dataset == "toy":
        toy_result.show(
            teacher, c.arch, c.dim_hidden, c.seed, c.toy_test_scenes, run.folder, seconds
        )
    elif c.held_out:
        images = recipes.held_out_images(c, run.notes["held_out"])
        photos_result.show(teacher, images, c.temp_teacher, run.folder, seconds)


def check_data(c: Config, given: set[str]) -> None:
    """--check-data: read everything once and report. Raises Stopped where a run would stop."""
    if c.dataset == "toy":
        raise ValueError(
            "--check-data reads photographs: give --data-dir, and a preset such as "
            "--preset coco-r50"
        )
    images, about = recipes.images_of(c, strict="dataset" in given)
    print(about)
    images = recipes.with_held_out(c, images)
    bad = loader.report_check(images, processes.workers_of(c.workers))
    if bad > c.max_bad_share * len(images):
        raise Stopped(
            f"{bad} of {len(images)} images cannot be read, more than --max-bad-share "
            f"{c.max_bad_share:g} allows: a run would stop"
        )


def start(argv: list[str] | None, prepared: Callable[[Run], None] | None = None) -> int:
    """From the command line to the end of the run, or to a pause."""
    c, given = recipes.parse(argv, __doc__)
    if c.check_data:
        check_data(c, given)
        return 0
    if c.plan:
        print(*planning.plan(c, take_step, strict="dataset" in given).lines(), sep="\n")
        return 0
    return live(
        c.output_dir,
        c.resume,
        set_up=lambda: set_up(c, given),
        loop=lambda run, signals: train(c, run, signals),
        finish=lambda run: finish(c, run),
        prepared=prepared,
    )


def main(argv: list[str] | None = None, prepared: Callable[[Run], None] | None = None) -> int:
    """prepared(run): called before the first step, to look on. Returns the exit status."""
    return run_program("train.py", functools.partial(start, prepared=prepared), argv)


if __name__ == "__main__":
    sys.exit(main())
