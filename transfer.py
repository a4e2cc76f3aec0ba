"""Fine-tune a pretrained backbone: Mask R-CNN for detection, an FCN for segmentation.

    python transfer.py segmentation --dataset toy --labeled 16 --backbone runs/toy/last.pth
    python transfer.py segmentation --dataset voc --data-dir VOCdevkit --backbone last.pth
    torchrun --nproc-per-node=8 transfer.py detection --data-dir COCO --backbone last.pth

Slides: tables 2, 3, 4 and 7.
Paper: section 4.2.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from downstream import settings
from downstream.settings import Shared
from engine.program import run_early, run_program

if __name__ == "__main__":  # a misspelled option is answered before torch is loaded
    run_early("transfer.py", lambda argv: settings.parse(argv, __doc__))

import torch

from downstream import detection, segmentation
from downstream.backbones import groups_of, open_pretrained, share, view
from engine import checkpoints, files, options, processes
from engine.guards import Paused
from engine.images import digest_of
from engine.log import say
from engine.ranks import copy_from_main
from engine.run import Options, Run
from measures.groups import COLUMNS, format_classes, table

TASKS = {"detection": detection, "segmentation": segmentation}


def train(c: Shared, run: Run, unseen: Sequence[Any]) -> None:
    """From the first step, or from where the run stopped, to the end or to a pause."""
    if test_is_due(c, run):
        test(c, run, unseen)  # the run was stopped while it was tested
    for batch in run.batches():  # whatever ends the loop, what was learned is saved
        torch.manual_seed(run.generator().initial_seed())  # dropout, the sampling of proposals
        run.remember()  # what a forward moves, so that a bad step can change nothing
        reports = []
        for part in run.parts(*batch):  # one, unless --accumulate
            with run.autocast():
                loss, report = run.network(*part)
            run.backward(loss)
            reports.append(report)
        if run.agree(torch.stack(reports).mean(dim=0)):  # over the parts
            run.step(c.learning_rate(run.steps))
        else:
            run.undo()
        run.end_step()
        if run.log_is_due():
            run.log(lambda line: f"loss {line['loss']:.3f}", lr=c.learning_rate(run.steps - 1))
        if test_is_due(c, run) and run.ended != "signal":
            test(c, run, unseen)


def test_is_due(c: Shared, run: Run) -> bool:
    """Whether the weights as they stand are to be scored, and have not been."""
    due = run.steps == c.total_steps or (c.test_every and run.steps % c.test_every == 0)
    return due and run.notes.get("result", {}).get("step", 0) < run.steps


def test(c: Shared, run: Run, unseen: Sequence[Any]) -> None:
    """Score the weights; all ranks share the images. The best are kept, and the result."""
    began = time.perf_counter()
    run.print(f"test     {len(unseen)} images")
    run.save()  # a test may take long
    copy_from_main(run.model.buffers())  # without SyncBN every rank has its own
    run.model.eval()
    torch.backends.cudnn.benchmark = False  # sizes change
    try:
        with run.autocast():
            items = share(unseen, run.place, c.workers, run.stopped)
            found = TASKS[c.task].scores(run.model, unseen, items, run.place)
    except Paused:  # the same command tests again
        run.ended = "signal"
        return
    run.model.train()
    torch.backends.cudnn.benchmark = c.task == "segmentation"
    result = dict(step=run.steps, **found)
    name, best = TASKS[c.task].SCORE, run.notes.get("best", -1.0)
    score = result[name] or 0.0
    run.notes.update(result=result, best=max(score, best))
    if run.writes:
        line = {key: value for key, value in result.items() if not isinstance(value, dict)}
        run.write(line, f"{name} {score:.4f}")
        try:
            if score >= best:
                kept = dict(config=run.settings, result=result, model=run.model.state_dict())
                checkpoints.save(run.folder / "best.pth", kept)
        except OSError as error:
            say(f"could not write best.pth: {error.strerror}; the run goes on")
    run.save()
    run.leave_out(began)


def finish(c: Shared, run: Run, tested: int) -> None:
    """What a run leaves, beside the slides' numbers."""
    if run.paused(c.total_steps):
        return
    best = f"best.pth has the best of all tests, {run.notes['best']:.3f}"
    run.print(f"done     {run.steps} steps; {best}")
    result = run.notes["result"]
    shown = [key for key in result if key in COLUMNS or key in settings.AP]
    rows = {"this run": result, **settings.slides_of(c, tested)}
    cells = {k: ["" if r.get(x) is None else f"{r[x]:.3f}" for x in shown] for k, r in rows.items()}
    print(table(cells, [COLUMNS.get(key, key) for key in shown]))
    if "iou" in result:
        print(format_classes(result))
    files.write_json(run.folder / "result.json", result)
    if c.json == "-":
        print(json.dumps(result))
    elif c.json:
        files.write_json(Path(c.json), result)


def main(argv: Sequence[str] | None = None) -> int:
    """From the command line to the end of the run, or to a pause; returns the exit status."""
    c, given = settings.parse(argv, __doc__)
    torch.set_num_threads(1 if c.dataset == "toy" else torch.get_num_threads())  # tiny tensors
    place = processes.start(c.device, c.amp)
    torch.backends.cudnn.benchmark = c.task == "segmentation"  # sizes of detection change
    torch.manual_seed(c.seed)  # the same heads on every rank
    backbone, c, about = open_pretrained(c, given)
    weights = checkpoints.weights_digest(backbone)
    model, seen, unseen = TASKS[c.task].prepare(c, backbone)
    names = digest_of([*seen.paths, "", *unseen.paths, "", *unseen.class_names])
    if place.rank == 0:
        print(f"look     at all {len(unseen)} images to test: whether they can be read", flush=True)
    sum(1 for _ in share(unseen, place, c.workers))
    model = processes.synchronized(model, place).train()
    optimizer = torch.optim.SGD(groups_of(model, c), c.base_lr, settings.MOMENTUM)
    run = Run(
        Options(last_step=c.last_step, **options.chosen_for(Options, c)),
        place, model, optimizer, range(len(seen)),
        view=functools.partial(view, TASKS[c.task].view, seen, c),
        settings=dict(task=c.task, images=names, **dataclasses.asdict(c)),
        changed=functools.partial(settings.differences, c, len(seen), names, weights),
        collate=TASKS[c.task].collate, names=model.losses,
    )  # fmt: skip
    run.notes["backbone"] = weights
    with run:
        run.print(f"device   {processes.describe(place)}", f"backbone {about}")
        run.print(f"data     {len(seen)} images to learn from, {len(unseen)} to test; "
                  f"{c.total_steps} steps of {c.batch_size}, base_lr {c.base_lr:g}")  # fmt: skip
        train(c, run, unseen)
    status = run.end()
    if run.ended == "done" and place.rank == 0:
        finish(c, run, len(unseen))
    return status


if __name__ == "__main__":
    sys.exit(run_program("transfer.py", main))
