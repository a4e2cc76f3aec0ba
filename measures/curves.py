"""Curves of training runs from their logs, beside what uniform assignments would log."""

import contextlib
import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # draws into files, without a window
from matplotlib.lines import Line2D

DESCRIBED = ("preset", "arch", "num_prototypes", "image_size")  # of one run
PRESETS = ("toy", "photos")  # those of which good runs were measured
PANELS = {  # key of the log -> title, the shape of the curve in a good run; measured: start to end
    "group_loss": ("Group loss", "leaves 2 ln k early", "8.1 to 1.8", "6.3 to 1.7"),
    "slot_loss": ("Slot loss", "below chance; may rise while groups split", "4.9 to 2.5"),
    "occupied_per_image": ("Occupied prototypes per image", "a few", "23, 7, 11", "16 to 7"),
    "prototypes_used": ("Prototypes in use", "1 to 3: collapsed", "31, 9 to 15, 17", "24 to 20"),
    "entropy_teacher": ("Teacher's entropy per pixel", "low; high: uniform", "0.8, 1.5, 0.3"),
    "entropy_mean": ("Teacher's entropy on average", "high; low: one prototype", "3.3 to 2.6"),
    "agreement": ("Agreement with the teacher", "far above chance", "0.05 to 0.75", "0.15 to 0.7"),
    "grad_norm": ("Gradient norm", "settles"),
    "lr": ("Learning rate", "ends near 0"),
    "momentum_teacher": ("Teacher's momentum", "as its option says", "stays 0.99", "stays 0.99"),
    "images_per_second": ("Images per second", "steady"),
    "data_seconds": ("Waiting for data, s per step", "near 0"),
}


class Run(NamedTuple):
    """A training run as its files describe it."""

    name: str
    records: list[dict]  # the lines of log.jsonl, one per step, ascending
    config: dict  # config.json, {} where none can be read


def read_run(folder: Path) -> Run:
    """The run of an output directory. Raises ValueError with one line."""
    file, records, config = folder / "log.jsonl", {}, {}
    if not file.is_file():
        raise ValueError(f"no {file}: give the output directory of a run")
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line is left out
            record = json.loads(line)
            records[record["step"]] = record  # one repeated after resuming counts once
    if not records:
        raise ValueError(f"{file} has no line with a step yet: wait until the run has written one")
    with contextlib.suppress(OSError, ValueError, TypeError):
        config = dict(json.loads((folder / "config.json").read_text()))
    return Run(folder.absolute().name, [records[step] for step in sorted(records)], config)


def chance_lines(records: Sequence[dict], config: Mapping[str, Any]) -> dict[str, list[float]]:
    """What uniform assignments would log: key -> a value per record. {} without k."""
    k = config.get("num_prototypes")
    if not k:
        return {}
    ln_k = math.log(k)
    levels = dict(group_loss=2 * ln_k, prototypes_used=k, entropy_mean=ln_k, agreement=1 / k)
    chance = {key: [level] * len(records) for key, level in levels.items()}
    if config.get("slot_loss", "ctr") == "ctr":  # all occupied slots of a forward, equally likely
        images = config["batch_size"] / config.get("accumulate", 1)
        keys = (max(record["occupied_per_image"] * images, 1) for record in records)
        chance["slot_loss"] = [4 * config.get("temp_slot", 0.2) * math.log(m) for m in keys]
    return chance


def legend_of(runs: Sequence[Run]) -> list[str]:
    """One line per run: its name and what is not the same in all runs; of one run, what it is."""
    names, options = DESCRIBED, [options_of(run.config) for run in runs]
    if len(runs) > 1:
        names = dict.fromkeys(itertools.chain(*options))
        names = [name for name in names if len({each.get(name) for each in options}) > 1]
    lines = []
    for run, own in zip(runs, options):
        words = [f"{each.replace('_', '-')} {own[each]}" for each in names if each in own]
        same = "none of these" if names else "no option differs"
        known = ", ".join(words) or (same if run.config else "no config.json")
        lines.append(textwrap.shorten(f"{run.name}: {known}", 150))
    return lines


def options_of(config: Mapping[str, Any]) -> dict[str, str]:
    """What decides a run, in words; of --epochs and --steps the one that counts."""
    unit = "steps" if config.get("steps") else "epochs"
    hidden = {"output_dir", "images", "steps", "epochs"} - {unit}  # images: a hash of their names
    shown = {k: x for k, x in config.items() if k not in hidden and (x or k != "max_steps")}
    words = {k: f"{x:.4g}" if isinstance(x, float) else str(x) for k, x in shown.items()}
    return words | {k: f"{words[k]} {unit}" for k in words.keys() & {"warmup"}}


def hint_of(key: str, runs: Sequence[Run]) -> str:
    """The shape of the curve in a good run; and a line for each preset that these runs have."""
    _, shape, *measured = PANELS[key]
    presets = {run.config.get("preset") for run in runs}
    known = [f"preset {name}: {text}" for name, text in zip(PRESETS, measured) if name in presets]
    return "\n".join([shape, *known])


def draw_runs(runs: Sequence[Run]) -> Figure:
    """A panel per number of the log, a color per run; dashed: `chance_lines`."""
    figure = Figure((14, 10 + 0.2 * len(runs)), layout="constrained")
    note = "Over steps. Dashed: uniform assignments, in the slot loss uniform keys."
    note += " Gray text: good runs, from start to end, and signs of bad ones."
    figure.suptitle(f"{note}\nNever judge by the loss: a collapsed run can have the lowest.")
    for axis, key in zip(figure.subplots(3, 4).flat, PANELS):
        handles = [draw_curve(axis, key, *pair) for pair in enumerate(runs)]
        hint = hint_of(key, runs)
        if all(np.isnan(line.get_ydata()).all() for line in handles):
            hint = "turned off, or not in the log"
            axis.set(xticks=[], yticks=[])
        axis.set_title(PANELS[key][0], loc="left", pad=9 + 11 * len(hint.splitlines()))
        axis.text(0, 1.03, hint, transform=axis.transAxes, fontsize=9, color="0.4")
        axis.spines[["top", "right"]].set_visible(False)
        momentum = key == "momentum_teacher"
        axis.set_ylim(bottom=None if momentum else 0, top=1 if momentum else None)
    figure.legend(handles, legend_of(runs), loc="outside lower center", frameon=False)
    return figure


def draw_curve(axis: Axes, key: str, number: int, run: Run) -> Line2D:
    """One number of the log of a run, and chance -> the curve; not a number where it is off."""
    color, style = f"C{number % 10}", ("-", "-.", ":")[number // 10 % 3]
    missing = [math.nan] * len(run.records)
    values = [record.get(key, math.nan) for record in run.records]
    chance = chance_lines(run.records, run.config).get(key, missing)
    if key.endswith("_loss") and not any(values):
        values = chance = missing
    steps = [record["step"] for record in run.records]
    axis.plot(steps, chance, "--", color=color, lw=0.8)
    # A short run is drawn over a long one
    return axis.plot(steps, values, style, color=color, zorder=2 + 1 / (1 + len(steps)))[0]
