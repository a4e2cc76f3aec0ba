"""Pretrain SlotCon: student, teacher, center and two losses, on toy scenes or on photographs.

    python train.py                                                   toy scenes, on a laptop
    python train.py --preset photos --data-dir PHOTOS                 a folder, on one machine
    python train.py --preset coco-r50 --data-dir COCO                 the published recipe
    torchrun --nproc-per-node=8 train.py --preset coco-r50 --data-dir COCO      on eight GPUs

Slide: "Together: solving segmentation & representation jointly".
Paper: sections 3 and 4.1.
Read next: evaluate.py. Side trip: recipes.py, all numbers of a run.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import recipes
from engine.program import Stopped, run_early, run_program

if __name__ == "__main__":  # a misspelled option is answered before torch is loaded
    run_early("train.py", lambda argv: recipes.parse(argv, __doc__))

import torch

import toy
from data import TwoCrops
from engine import batches, checkpoints, files, options, processes
from engine.images import digest_of, open_images
from engine.options import chosen_for  # the options that are named like a function's parameters
from engine.optimizers import Schedule, make_optimizer, schedule_for
from engine.processes import Place
from engine.run import Options, Run
from measures.learning import Watch, brief, statistics
from photometric import Photometric
from recipes import Config
from slotcon import SlotCon
from teacher import teacher_momentum


def train(c: Config, run: Run, model: SlotCon, schedule: Schedule) -> None:
    """From the first step, or from where the run stopped, to the end or to a pause."""
    photometric = Photometric(**chosen_for(Photometric, c))
    watch = Watch(c, schedule.warmup_steps, schedule.total_steps, run.notes)
    for batch in run.batches():  # whatever ends the loop, what was learned is saved
        views = photometric(batch.views, run.generator())
        run.remember()  # what a forward moves, so that a bad step can change nothing
        reports = []
        for part in run.parts(views, batch.boxes, batch.flipped):  # one, unless --accumulate
            with run.autocast():
                loss, report = run.network(*part)
            run.backward(loss)
            reports.append(report)
        losses = torch.stack([report.losses for report in reports]).mean(dim=0)  # over the parts
        if run.agree(losses):  # all ranks: finite, nobody must stop; the host waits here
            run.step(schedule.learning_rate(run.steps))
            means = torch.stack([report.center_mean for report in reports])
            model.update_center(means.mean(dim=0), c.momentum_center)  # over the parts
            model.update_teacher(momentum_of(c, schedule, run.steps + 1))
        else:
            run.undo()
        run.end_step()
        if run.good:
            run.print(*watch.step(report, batch.boxes, batch.flipped))
        if run.log_is_due():
            record = run.log(
                brief,
                lr=schedule.learning_rate(run.steps - 1),
                momentum_teacher=momentum_of(c, schedule, run.steps),
                **statistics(report, model.center, c.temp_teacher),
            )
            run.print(*watch.line(record))


def momentum_of(c: Config, schedule: Schedule, step: int) -> float:
    """The teacher's momentum after `step` steps."""
    return teacher_momentum(step, schedule.total_steps, *c.momentum_teacher)


def start(c: Config, given: set[str]) -> int:
    """Sets a run up, trains, and shows the result; returns the exit status.

    given: the names of the options on the command line. Raises ValueError, Stopped.
    """
    torch.set_num_threads(c.threads or torch.get_num_threads())
    place = processes.start(c.device, c.amp)
    if place.device.type == "cuda" and "workers" not in given:
        c = dataclasses.replace(c, workers=-1)  # a preset's number is for a CPU
    images, held_out, about = images_of(c, "dataset" in given)
    names = getattr(images, "paths", [])  # toy scenes have none
    schedule = schedule_for(num_images=len(images), **chosen_for(schedule_for, c))
    torch.manual_seed(c.seed)  # the same weights on every rank
    model = processes.synchronized(SlotCon(**chosen_for(SlotCon, c)).train(), place, c.sync_norm)
    model.side_by_side = processes.has_spare_core(place) and not (c.compile or c.freeze_backbone)
    started = checkpoints.start_from(model, c.init) if c.init else "random weights"
    for network in (model.student, model.teacher) if c.compile else ():
        network.backbone.compile()
        network.projector.compile()
    last_step = min(schedule.total_steps, c.max_steps or schedule.total_steps)
    run = Run(
        Options(last_step=last_step, **chosen_for(Options, c)),
        place,
        model,
        make_optimizer(c.optimizer, model.parameters(), schedule.peak, c.weight_decay),
        images,
        view=TwoCrops(**chosen_for(TwoCrops, c)),
        settings=dataclasses.asdict(c),
        changed=lambda saved: differences(c, len(images), digest_of(names), saved),
        names=("loss", "group_loss", "slot_loss"),
    )
    other = run.notes.get("images") not in (None, digest_of(names))  # with --resume force
    run.notes.update(images=digest_of(names), changed=run.notes.get("changed", False) or other)
    if c.subset and len(names) and place.rank == 0:
        files.write_lines(run.folder / "subset.txt", names)
    with run:
        run.print(f"device   {processes.describe(place)}", f"data     {about}")
        run.print(*describe(c, schedule, place, model))
        run.print(f"start    {f'after step {run.steps}' if run.steps else started}")
        train(c, run, model, schedule)
    status = run.end()
    if run.finished and place.rank == 0:
        finish(c, run, schedule, held_out)
    return status


def images_of(c: Config, strict: bool) -> tuple[Sequence[Any], Sequence[Any], str]:
    """What is learned from, what is kept out, and lines that say what both are."""
    if c.dataset == "toy":
        return toy.ToyImages(c.seed, c.subset), (), f"{c.subset} toy scenes, drawn here"
    return open_images(layout=c.dataset, strict=strict, **chosen_for(open_images, c))


def differences(c: Config, num_images: int, digest: str, saved: Mapping[str, Any]) -> list[str]:
    """What a checkpoint was made with and this run is not. digest: of the names of the images."""
    changed = options.differences(c, saved["config"])
    if saved["num_images"] != num_images:
        changed.append(f"images: {saved['num_images']} then, {num_images} now")
    elif saved["notes"].get("images", digest) != digest:
        changed.append(f"images: as many then ({num_images}), but other ones")
    return changed


def describe(c: Config, schedule: Schedule, place: Place, model: SlotCon) -> list[str]:
    """What will be trained, on a few lines."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    parts = place.world_size * c.accumulate
    lines = [
        f"network  {c.arch}{', frozen' * c.freeze_backbone}, {c.num_prototypes} prototypes; "
        f"{trained:.2f} M parameters trained{', compiled in the first minutes' * c.compile}",
        f"batch    {c.batch_size} = {c.batch_size // parts} x {place.world_size} process(es)"
        f"{f' x --accumulate {c.accumulate}' * (c.accumulate > 1)}; "
        f"{schedule.steps_per_epoch} steps per epoch, {schedule.total_steps} in all",
        f"lr       {schedule.peak:g} = {c.base_lr:g} x {c.batch_size} / 256, {c.optimizer}, "
        f"warm-up {schedule.warmup_steps} steps",
        f"chance   2 ln k = {2 * math.log(c.num_prototypes):.3f}: the group loss of a uniform "
        "assignment",
    ]
    if schedule.warmup_steps >= schedule.total_steps:
        lines.append("warning  the warm-up is no shorter than the run: lower --warmup")
    if c.batch_size == c.accumulate:
        lines.append("warning  one image per pass: batch norm and contrast see no other image")
    return lines


@torch.compiler.set_stance("force_eager")  # --compile would take longer than a few images
def finish(c: Config, run: Run, schedule: Schedule, held_out: Sequence[Any]) -> None:
    """What a run leaves: the teacher's backbone for others, and a look at what was found."""
    if run.paused(schedule.total_steps):
        return
    file = run.folder / "backbone.pth"
    try:
        checkpoints.save(file, run.model.teacher.backbone.state_dict())
    except OSError as error:
        raise Stopped(f"could not write {file}: {error}; {run.command()}") from None
    run.print(f"done     {run.steps} steps; {file} is the teacher's backbone")
    from measures import results  # only here: it brings matplotlib, which no step needs

    if c.dataset == "toy":
        results.toy_result(run, c)
    elif len(held_out):
        results.photos_result(run, c, held_out)


def main(argv: Sequence[str] | None = None) -> int:
    """From the command line to the end of the run, or to a pause; returns the exit status."""
    c, given = recipes.parse(argv, __doc__)
    if not c.check_data:
        return start(c, given)
    images, held_out, about = images_of(c, "dataset" in given)
    print(about)
    parts = {"to learn from": images} | ({"kept out": held_out} if len(held_out) else {})
    return int(batches.check_images(parts, c.workers))


if __name__ == "__main__":
    sys.exit(run_program("train.py", main))
