"""The result of a toy run: what the teacher's prototypes found in scenes it was never trained on.

Slide: "Slot Attention works well on toy data", and its next question, what of real scenes? Paper:
none.
Differs: ours [U].
"""

from __future__ import annotations

import time
from pathlib import Path

import toy
from engine.files import write_json
from grouping import GroupingNetwork
from measures.figures import draw_groups
from measures.grouping_report import compare_in_memory, format_table
from measures.labels import UNSEEN
from measures.networks import untrained_network
from measures.segments import segment

SHOWN = 8  # scenes in groups.png


def show(
    teacher: GroupingNetwork, arch: str, dim_hidden: int, seed: int, count: int, folder: Path,
    seconds: float,
) -> dict:  # fmt: skip
    """Measure the teacher, write result.json and groups.png into the folder, and print the table.

    arch, dim_hidden, seed: of the untrained network to compare with, whose other sizes are the
    teacher's; count: unseen scenes; seconds: how long the run took so far. Returns the report. The
    teacher is in evaluation mode afterwards. Raises OSError.
    """
    start = time.perf_counter()
    k, dim_out = teacher.prototypes.weight.shape
    device = teacher.prototypes.weight.device
    scenes = toy.ToyImages(UNSEEN, count)
    untrained = untrained_network(arch, k, dim_hidden, dim_out, device, seed)
    report = compare_in_memory(teacher, untrained, scenes.images, scenes.semantic, toy.CLASS_NAMES)
    report["seconds"] = round(seconds + time.perf_counter() - start, 1)
    write_json(folder / "result.json", report)
    images, label = scenes.images[:SHOWN], scenes.semantic[:SHOWN]
    groups, _ = segment(teacher, images)
    draw_groups(
        folder / "groups.png",
        images,
        groups,
        label,
        k,
        toy.CLASS_NAMES,
        report["matching"],
        report["iou"],
    )
    print(f"\n{count} scenes never trained on, {report['seconds']:.0f} s in all\n")
    print(format_table(report))
    print(
        f"\nfigure   {folder / 'groups.png'}; the numbers are in {folder / 'result.json'}",
        flush=True,
    )
    return report
