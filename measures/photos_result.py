"""The result of a run on photographs without labels: what the prototypes find in those kept out.

Slide: "Understanding the semantic grouping ability: nearest neighbor visualization" (figure 3);
"Statistics about the slots".
Paper: section 4.4.
Differs: ours [U]. Without labels nothing here says whether groups are classes: look at them.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from engine.files import write_json
from engine.images import BadImage, ImageFiles
from grouping import GroupingNetwork
from measures import retrieval, slot_statistics
from measures.figures import draw_parts, draw_prototypes
from measures.streams import center_view, read_views, stream

SIZE, SHOWN, TOP, BATCH = 224, 8, 5, 16  # px; photographs in groups.png; segments; at a time


def readable(images: ImageFiles) -> ImageFiles:
    """Those that can be read; the others are named on stderr."""
    good = []
    for i, name in enumerate(images.paths):
        try:
            images[i]
            good.append(name)
        except BadImage as bad:
            print(f"left out {bad.name}: {bad.reason}", file=sys.stderr)
    return ImageFiles(images.root, np.array(good, dtype=str))


@torch.no_grad()
def show(
    teacher: GroupingNetwork, images: ImageFiles, temperature: float, folder: Path, seconds: float
) -> dict:
    """Write result.json, groups.png and prototypes.png into the folder, and print what they say.

    images: kept out of training; temperature: of the soft assignment; seconds: how long the run
    took so far. Returns the report, empty where none of the images can be read. The teacher is in
    evaluation mode afterwards. Raises OSError.
    """
    start = time.perf_counter()
    teacher.eval()
    images, view = readable(images), center_view(SIZE)
    if not len(images):
        print(
            "\nfigures  none, since no photograph was kept out of training that can be read; "
            f"look at others: python visualize.py groups {shlex.quote(str(folder))} A.jpg",
            flush=True,
        )
        return {}
    counts = slot_statistics.slot_counts(teacher, stream(images, view, BATCH))
    report = slot_statistics.slot_report(*counts)
    found = retrieval.retrieve(teacher, images, view, TOP, BATCH, workers=0)
    chosen = retrieval.choose_prototypes(found.active, ["used"], 12)
    files = draw_prototypes(folder / "prototypes.png", teacher, images, view, found, chosen)
    some = ImageFiles(images.root, images.paths[:SHOWN])
    files += draw_parts(folder / "groups.png", teacher, read_views(some, view), temperature)
    report["seconds"] = round(seconds + time.perf_counter() - start, 1)
    write_json(folder / "result.json", report)
    print(f"\n{len(images)} photographs kept out of training, {report['seconds']:.0f} s in all")
    print(slot_statistics.format_slots(report))
    print(f"\nfigures  {', '.join(map(str, files))}; the numbers are in {folder / 'result.json'}")
    print(
        "labels   with images/ and labels/ of equal names in a folder F, groups are measured by "
        f"python evaluate.py segmentation {shlex.quote(str(folder))} --dataset folder "
        f"--data-dir F --size {SIZE}",
        flush=True,
    )
    return report
