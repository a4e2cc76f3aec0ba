"""The result of a run on photographs without labels: what the prototypes find in those kept out.

Slide: "Understanding the semantic grouping ability: nearest neighbor visualization" (figure 3);
"Statistics about the slots".
Paper: section 4.4.
Differs: ours [U]. Without labels nothing here says whether groups are classes: look at them.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import torch

from engine.files import write_json
from engine.images import ImageFiles
from grouping import GroupingNetwork
from measures import retrieval, slot_statistics
from measures.figures import draw_parts, draw_prototypes
from measures.streams import center_view, read_views, stream

SIZE, SHOWN, TOP, BATCH = 224, 8, 5, 16  # px; photographs in groups.png; segments; at a time


@torch.no_grad()
def show(
    teacher: GroupingNetwork, images: ImageFiles, temperature: float, folder: Path, seconds: float
) -> dict:
    """Write result.json, groups.png and prototypes.png into the folder, and print what they say.

    images: kept out of training; temperature: of the soft assignment; seconds: how long the run
    took so far. Returns the report. The teacher is in evaluation mode afterwards. Raises OSError,
    ValueError for an image that cannot be read.
    """
    start = time.perf_counter()
    teacher.eval()
    view = center_view(SIZE)
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
    print("labels   with images/ and labels/ of equal names in a folder F, groups are measured by "
          f"python evaluate.py segmentation {shlex.quote(str(folder))} --dataset folder "
          f"--data-dir F --size {SIZE}",
          flush=True)
    return report
