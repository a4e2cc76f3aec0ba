"""Temporary."""
from __future__ import annotations
import time
from pathlib import Path
import evaluate, visualize, toy
from engine.files import write_json
from measures import labels
def show(teacher, arch, num_prototypes, dim_hidden, dim_out, seed, count, folder, began):
    scenes = toy.ToyImages(labels.UNSEEN, count)
    untrained = evaluate.untrained_like(dict(arch=arch, num_prototypes=num_prototypes, dim_hidden=dim_hidden, dim_out=dim_out), "cpu", seed)
    report = evaluate.toy_report(teacher, untrained, scenes.images, scenes.semantic, teacher.prototypes.weight.device)
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "result.json", report)
    shown, _ = evaluate.segment(teacher.eval(), scenes.images[:8])
    visualize.save_groups(folder / "groups.png", scenes.images[:8], shown, scenes.semantic[:8], num_prototypes, toy.CLASS_NAMES, report["matching"], report["iou"])
    print(f"\n{len(scenes)} scenes never trained on, {report['seconds']:.0f} s in all\n")
    print(evaluate.format_table(report))
    print(f"\nlook at  {folder / 'groups.png'}; the numbers are in {folder / 'result.json'}", flush=True)
