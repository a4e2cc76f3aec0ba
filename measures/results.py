"""What a run shows at its end: numbers, a table and figures of images it was not trained on."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

import toy
from engine.files import write_json
from engine.images import BadImage, ImageFiles
from grouping import GroupingNetwork
from measures import retrieval, slot_statistics
from measures.datasets import UNSEEN
from measures.figures import draw_groups, draw_parts, draw_prototypes
from measures.groups import compare_in_memory, format_table, segment
from measures.networks import untrained_network
from measures.streams import center_view, read_views, stream

SHOWN = 8  # images in groups.png
SIZE, BATCH = 224, 16  # of photographs: px; at a time


def toy_result(teacher: GroupingNetwork, c: Any, folder: Path, seconds: float) -> dict:
    """Measure the teacher, write result.json and groups.png into the folder, and print the table.

    c: settings with held_out (unseen scenes), arch, dim_hidden and seed; seconds: that the run took
    so far. Returns the report. The teacher is in evaluation mode afterwards.
    """
    start = time.perf_counter()
    (k, dim_out), device = teacher.prototypes.weight.shape, teacher.prototypes.weight.device
    scenes = toy.ToyImages(UNSEEN, c.held_out)
    untrained = untrained_network(c.arch, k, c.dim_hidden, dim_out, device, c.seed)
    report = compare_in_memory(teacher, untrained, scenes.images, scenes.semantic, toy.CLASS_NAMES)
    report["seconds"] = round(seconds + time.perf_counter() - start, 1)
    write_json(folder / "result.json", report)
    images, label = scenes.images[:SHOWN], scenes.semantic[:SHOWN]
    draw_groups(folder / "groups.png", images, segment(teacher, images)[0], label, k, report)
    print(f"\n{c.held_out} scenes never trained on, {report['seconds']:.0f} s in all\n")
    print(format_table(report))
    print(f"\nfigures  {folder / 'groups.png'}; the numbers are in {folder / 'result.json'}")
    return report


@torch.no_grad()
def photos_result(
    teacher: GroupingNetwork, images: ImageFiles, temperature: float, folder: Path, seconds: float
) -> dict:
    """Write result.json, groups.png and prototypes.png into the folder, and print the numbers.

    images: kept out of training; temperature: of the soft assignment; seconds: as in `toy_result`.
    Returns the report, empty where none of the images can be read.
    """
    start = time.perf_counter()
    teacher.eval()
    images, view, run = readable(images), center_view(SIZE), shlex.quote(str(folder))
    if not len(images):
        command = f"python visualize.py groups {run} A.jpg"
        print(
            f"\nfigures  none: no photograph that was kept out can be read; for others: {command}"
        )
        return {}
    counts = slot_statistics.slot_counts(teacher, stream(images, view, BATCH))
    report = slot_statistics.slot_report(*counts)
    found = retrieval.retrieve(teacher, images, view, 5, BATCH, workers=0)
    chosen = retrieval.choose_prototypes(found.active, ["used"], 12)
    files = draw_prototypes(folder / "prototypes.png", teacher, images, view, found, chosen)
    some = ImageFiles(images.root, images.paths[:SHOWN])
    files += draw_parts(folder / "groups.png", teacher, read_views(some, view), temperature)
    report["seconds"] = round(seconds + time.perf_counter() - start, 1)
    write_json(folder / "result.json", report)
    print(f"\n{len(images)} photographs kept out of training, {report['seconds']:.0f} s in all")
    print(slot_statistics.format_slots(report))
    print(f"\nfigures  {', '.join(map(str, files))}; the numbers are in {folder / 'result.json'}")
    command = f"python evaluate.py segmentation {run} --dataset folder --data-dir F --size {SIZE}"
    print(f"labels   with images/ and labels/ in a folder F, measure them: {command}")
    return report


def readable(images: ImageFiles) -> ImageFiles:
    """The images that can be read; the others are named on stderr."""
    good = []
    for i in range(len(images)):
        try:
            images[i]
            good.append(images.name(i))
        except BadImage as bad:
            print(f"left out {bad.name}: {bad.reason}", file=sys.stderr)
    return ImageFiles(images.root, good)
