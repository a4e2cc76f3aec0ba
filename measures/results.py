"""What a run shows at its end: numbers, a table and figures of images it was not trained on."""

from typing import Any

import torch

import toy
from engine.files import write_json
from engine.images import Photographs
from engine.run import Run
from measures import figures, retrieval
from measures.datasets import UNSEEN
from measures.groups import compare_in_memory, format_table, segment
from measures.networks import untrained_network
from measures.streams import SIZE, center_view, spaced, stream

SHOWN = 8  # images in groups.png
BATCH = 16  # photographs at a time
TITLE = """Scenes never trained on, and the groups found in them without a label.
A class and the prototype that is matched with it have one color; other colors have no class."""


def toy_result(run: Run, c: Any) -> None:
    """Write result.json and groups.png of unseen scenes, and print the numbers."""
    run.print(f"measures {c.held_out} scenes that nothing was learned from")
    teacher, scenes = run.model.teacher, toy.ToyImages(UNSEEN, c.held_out)
    untrained = untrained_network(vars(c), teacher.prototypes.weight.device, c.seed)
    report = compare_in_memory(teacher, untrained, scenes.images, scenes.semantic, toy.CLASS_NAMES)
    images, truth = scenes.images[:SHOWN], scenes.semantic[:SHOWN]
    groups, owner = segment(teacher, images)[0], list(report["matching"].values())
    colors = figures.prototype_colors(len(owner))
    rows = dict(scene=figures.as_images(images), groups=figures.color_groups(groups, truth, owner))
    rows["truth"] = colors[truth]
    classes = zip(report["iou"].items(), owner, colors)
    legend = {f"{name}: prototype {k}, IoU {x or 0:.2f}": rgb for (name, x), k, rgb in classes}
    figure = figures.grid(TITLE, list(rows.values()), list(rows), legend=legend)
    figures.save(figure, run.folder / "groups.png", 130)
    text = f"{c.held_out} scenes never trained on\n\n{format_table(report)}"
    finish(run, report, text, "groups.png")


@torch.no_grad()
def photos_result(run: Run, c: Any, images: Photographs) -> None:
    """`toy_result` for photographs kept out of training; without numbers if none is readable."""
    seen = "some of which may have been learned from: the images were changed"
    what = seen if run.notes["changed"] else "kept out of training"
    run.print(f"measures {len(images)} photographs, {what}")
    teacher, view = run.model.teacher.eval(), center_view(SIZE)
    shown = [views for _, views in stream(images, view, BATCH)]  # what can be read
    if not shown:
        run.print("\nfigures  none: no photograph that was kept out can be read")
        return
    views = torch.cat(shown)
    found = retrieval.retrieve(teacher, views, view)
    report = retrieval.slot_report(found)
    chosen = retrieval.choose_prototypes(found.active, ["used"], 12)
    figures.draw_prototypes(run.folder / "prototypes.png", teacher, views, view, found, chosen)
    file, some = run.folder / "groups.png", views[spaced(len(views), SHOWN)]
    figures.draw_parts(file, teacher, some, c.temp_teacher, use=found.cells)
    text = f"{len(views)} photographs, {what}\n{retrieval.format_slots(report)}"
    how = f"of {SIZE} px; the log counts in crops of {c.image_size} px, which show less"
    text += f"\ncounted in whole photographs {how}"
    finish(run, report, text, "prototypes.png and groups.png")


def finish(run: Run, report: dict, text: str, figures: str) -> None:
    """Puts a report into result.json, with the seconds of the run, and prints it."""
    report["seconds"] = round(run.seconds, 1)
    write_json(run.folder / "result.json", report)
    run.print(f"\n{text}\n\n{report['seconds']:.0f} s in all")
    run.print(f"figures  {figures} in {run.folder}; the numbers are in result.json")
