"""What a run shows at its end: numbers, a table and figures of images it was not trained on."""

import shlex
from typing import Any

import torch

import toy
from engine.files import write_json
from engine.images import ImageFiles
from engine.run import Run
from measures import retrieval, slot_statistics
from measures.datasets import UNSEEN
from measures.figures import draw_groups, draw_parts, draw_prototypes
from measures.groups import compare_in_memory, format_table, segment
from measures.networks import untrained_network
from measures.streams import center_view, stream

SHOWN = 8  # images in groups.png
SIZE, BATCH = 224, 16  # of photographs: px; at a time


def toy_result(run: Run, c: Any) -> dict:
    """Write result.json and groups.png of unseen scenes, print and return the report."""
    teacher, folder, k = run.model.teacher, run.folder, c.num_prototypes
    device, scenes = teacher.prototypes.weight.device, toy.ToyImages(UNSEEN, c.held_out)
    untrained = untrained_network(c.arch, k, c.dim_hidden, c.dim_out, device, c.seed)
    report = compare_in_memory(teacher, untrained, scenes.images, scenes.semantic, toy.CLASS_NAMES)
    images, label = scenes.images[:SHOWN], scenes.semantic[:SHOWN]
    draw_groups(folder / "groups.png", images, segment(teacher, images)[0], label, k, report)
    report["seconds"] = round(run.seconds, 1)
    write_json(folder / "result.json", report)
    print(f"\n{c.held_out} scenes never trained on, {report['seconds']:.0f} s in all\n")
    print(format_table(report))
    print(f"\nfigures  {folder / 'groups.png'}; the numbers are in {folder / 'result.json'}")
    return report


@torch.no_grad()
def photos_result(run: Run, c: Any, images: ImageFiles) -> dict:
    """`toy_result` for photographs kept out of training; {}: none is readable."""
    teacher, folder = run.model.teacher.eval(), run.folder
    view, shown = center_view(SIZE), shlex.quote(str(folder))
    batches = list(stream(images, view, BATCH))  # without those that cannot be read
    if not batches:
        reason = "no photograph that was kept out can be read"
        print(f"\nfigures  none: {reason}; for others: python visualize.py groups {shown} A.jpg")
        return {}
    report = slot_statistics.slot_report(*slot_statistics.slot_counts(teacher, batches))
    views, file = torch.cat([views for _, views in batches]), folder / "groups.png"
    found = retrieval.retrieve(teacher, views, view, 5, BATCH, workers=0)
    chosen = retrieval.choose_prototypes(found.active, ["used"], 12)
    files = draw_prototypes(folder / "prototypes.png", teacher, views, view, found, chosen)
    files += draw_parts(file, teacher, views[:SHOWN], c.temp_teacher, use=found.cells)
    report["seconds"] = round(run.seconds, 1)
    write_json(folder / "result.json", report)
    print(f"\n{len(views)} photographs kept out of training, {report['seconds']:.0f} s in all")
    print(slot_statistics.format_slots(report))
    print(f"counted in whole photographs of {SIZE} px; the log counts in crops of {c.image_size} "
          "px, which show less, so fewer slots are occupied")  # fmt: skip
    print(f"\nfigures  {', '.join(map(str, files))}; the numbers are in {folder / 'result.json'}")
    command = f"python evaluate.py segmentation {shown} --dataset folder --data-dir F --size {SIZE}"
    print(f"labels   with images/ and labels/ in a folder F, measure them: {command}")
    return report
