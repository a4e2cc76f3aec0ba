"""Curves of a training run from its log, beside what a network would log that has learned nothing.

Slide: "Statistics about the slots" (figure 4: active slots during training).
Paper: appendix.
Differs: ours [U].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # draws into files, without a window

BLUE, ORANGE = "#0072B2", "#D55E00"
RUN_COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MOST_DIFFERENCES = 6  # options of a run that the legend names
NOT_COMPARED = ("output_dir", "resume", "force_resume")


class Run(NamedTuple):
    """A training run as its files describe it."""

    name: str
    records: list[dict]  # the lines of log.jsonl, one per step, ascending
    config: dict  # config.json, {} where there is none


def read_run(folder: Path) -> Run:
    """The log and the configuration of a run; folder: its output directory, or its log.jsonl.

    A line that was cut off when the run died is left out; a step that was repeated after resuming
    counts once. Raises ValueError with one line.
    """
    file = folder if folder.suffix == ".jsonl" else folder / "log.jsonl"
    if not file.is_file():
        raise ValueError(f"no {file}: give the output directory of a run")
    records = {}
    for line in file.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    if not records:
        raise ValueError(f"{file} has no line with a step yet: wait until the run has written one")
    config = file.with_name("config.json")
    return Run(file.absolute().parent.name, [records[step] for step in sorted(records)],
               read_config(config) if config.is_file() else {})


def read_config(file: Path) -> dict[str, Any]:
    """The options of a run. Raises ValueError with one line where the file is cut or holds others.
    """
    try:
        config = json.loads(file.read_text())
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{file} is damaged ({error}): without the file the curves are drawn "
                         "without chance lines") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no options of a run, which are a JSON object, but a "
                         f"{type(config).__name__}")
    return config


def chance_lines(records: Sequence[dict], config: Mapping[str, Any]) -> dict[str, list[float]]:
    """What a network that has learned nothing would log: key -> a value per record. {} without k.

    group_loss: uniform assignments, ln k in each of two directions. slot_loss: every key equally
    likely, with the factor 2 temp_slot in each of two directions; the keys are the occupied slots
    of the batch.
    """
    k = config.get("num_prototypes")
    if not k:
        return {}
    images = config["batch_size"] / config.get("accumulate", 1)  # contrasted with each other
    keys = [max(record["occupied_per_image"] * images, 1) for record in records]
    chance = {
        "group_loss": [2 * math.log(k)] * len(records),
        "prototypes_used": [k] * len(records),
        "entropy_mean": [math.log(k)] * len(records),
        "agreement": [1 / k] * len(records),
    }
    if config.get("slot_loss", "ctr") == "ctr":
        temperature = config.get("temp_slot", 0.2)
        chance["slot_loss"] = [4 * temperature * math.log(count) for count in keys]
    return chance


def values(records: Sequence[dict], key: str) -> list[float]:
    """A key of every record, nan where it is missing."""
    return [record.get(key, math.nan) for record in records]


def description(config: Mapping[str, Any]) -> str:
    """What was trained, in a few words: "toy: tiny, k = 16, 48 px"."""
    words = {"arch": "{}", "num_prototypes": "k = {}", "image_size": "{} px"}
    known = ", ".join(form.format(config[name]) for name, form in words.items() if name in config)
    return f"{config.get('preset', 'run')}: {known}" if known else config.get("preset", "run")


# ---------------------------------------------------------------------------------------- one run


class Panel(NamedTuple):
    """One panel of the figure of one run."""

    title: str
    healthy: str  # the shape of the curves in a good run
    keys: dict[str, str]  # key of the log -> label; the first is blue, the second orange
    chance: str = ""  # key of `chance_lines`
    chance_label: str = ""
    right: tuple[str, str] = ("", "")  # key and label of a second axis
    right_top: float | None = None  # upper end of the second axis


PANELS = (
    Panel("Group loss", "leaves the line early\n(on it, the assignment is uniform)",
          {"group_loss": "loss"}, "group_loss", "uniform: 2 ln k"),
    Panel("Slot loss", "well below chance\n(it may rise while groups split)",
          {"slot_loss": "loss"}, "slot_loss", "chance"),
    Panel("Prototypes", "a few per image,\nmost of them in use",
          {"occupied_per_image": "per image", "prototypes_used": "in use"}, "prototypes_used", "k"),
    Panel("Entropy of the teacher",
          "low per pixel, high on average\n(both high: uniform; both low: one prototype)",
          {"entropy_teacher": "per pixel", "entropy_mean": "of the mean"}, "entropy_mean", "ln k"),
    Panel("Student agrees with teacher", "rises far above chance",
          {"agreement": "share"}, "agreement", "chance: 1 / k"),
    Panel("Gradient norm", "settles; no step is skipped",
          {"grad_norm": "norm", "skipped_steps": "skipped"}),
    Panel("Schedules", "the learning rate ends near 0, the momentum near 1",
          {"lr": "learning rate"}, right=("momentum_teacher", "teacher's momentum"), right_top=1.0),
    Panel("Speed", "steady; waiting for data near 0",
          {"images_per_second": "images / s"}, right=("data_seconds", "s waiting")),
)


def draw_run(run: Run) -> Figure:
    """Eight panels; under each title, how a healthy run looks."""
    records, step = run.records, values(run.records, "step")
    figure = Figure((14, 6.8), layout="constrained")
    figure.suptitle(f"{description(run.config)}; {len(records)} records up to step {step[-1]}. "
                    "Never judge by the total loss: a collapsed run can have the lowest.",
                    fontsize=11)
    chance = chance_lines(records, run.config)
    for axis, panel in zip(figure.subplots(2, 4).flat, PANELS):
        for (key, label), color in zip(panel.keys.items(), (BLUE, ORANGE)):
            axis.plot(step, values(records, key), color=color, label=label)
        if panel.chance in chance:
            axis.plot(step, chance[panel.chance], "--", color="black", lw=1,
                      label=panel.chance_label)
        head(axis, panel.title, f"healthy: {panel.healthy}")
        if panel.right[0]:
            draw_right(axis, panel, step, values(records, panel.right[0]))
        elif len(axis.get_lines()) > 1:
            axis.legend(frameon=False, fontsize=8)
    figure.supxlabel("optimizer step", fontsize=9)
    return figure


def head(axis: Axes, title: str, note: str) -> None:
    """Title, a small note under it, no frame, and a scale from 0."""
    axis.set_title(title, fontsize=10, loc="left", pad=24 if note else 6)
    axis.text(0, 1.02, note, transform=axis.transAxes, fontsize=7.5, color="0.3")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(bottom=0)


def draw_right(axis: Axes, panel: Panel, step: list[float], curve: list[float]) -> None:
    """A second curve with an axis of its own on the right."""
    other = axis.twinx()
    other.plot(step, curve, color=ORANGE)
    other.spines["top"].set_visible(False)
    if panel.right_top is None:
        other.set_ylim(bottom=0)
    else:
        low = min((value for value in curve if math.isfinite(value)), default=0.0)
        margin = max(0.05 * (panel.right_top - low), 0.001)
        other.set_ylim(low - margin, panel.right_top)
    axis.set_ylabel(next(iter(panel.keys.values())), color=BLUE, fontsize=8)
    other.set_ylabel(panel.right[1], color=ORANGE, fontsize=8)


# ----------------------------------------------------------------------------------- several runs

COMPARED = {  # key of the log -> title
    "group_loss": "Group loss", "slot_loss": "Slot loss",
    "occupied_per_image": "Prototypes per image", "prototypes_used": "Prototypes in use",
    "entropy_teacher": "Entropy of the teacher, per pixel",
    "entropy_mean": "Entropy of the teacher, of the mean",
    "agreement": "Student agrees with teacher", "grad_norm": "Gradient norm",
}  # fmt: skip


def differing_options(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every configuration its options that are not the same in all."""
    names = dict.fromkeys(name for config in configs for name in config)
    differ = [name for name in names if name not in NOT_COMPARED
              and any(config.get(name) != configs[0].get(name) for config in configs)]
    return [{name: config[name] for name in differ if name in config} for config in configs]


def legend_of(runs: Sequence[Run]) -> list[str]:
    """One line per run: its name and the options that differ."""
    lines = []
    for run, options in zip(runs, differing_options([run.config for run in runs])):
        words = [f"{name.replace('_', '-')} {value}" for name, value in options.items()]
        more = [f"{len(words) - MOST_DIFFERENCES} more"] if len(words) > MOST_DIFFERENCES else []
        known = ", ".join(words[:MOST_DIFFERENCES] + more) if run.config else "no config.json"
        lines.append(f"{run.name}: {known or 'no option differs'}")
    return lines


def draw_comparison(runs: Sequence[Run]) -> Figure:
    """Eight panels with one color per run; thin dashed: chance; the legend has what differs."""
    figure = Figure((14, 7.0 + 0.2 * len(runs)), layout="constrained")
    figure.suptitle(f"{len(runs)} runs. Dashed: a network that has learned nothing. Never judge by "
                    "the loss alone: a collapsed run can have the lowest.", fontsize=11)
    axes = figure.subplots(2, 4).ravel()
    handles = []
    for number, run in enumerate(runs):
        color = RUN_COLORS[number % len(RUN_COLORS)]
        style = ("-", "-.", ":")[number // len(RUN_COLORS) % 3]
        step, chance = values(run.records, "step"), chance_lines(run.records, run.config)
        for axis, key in zip(axes, COMPARED):
            line, = axis.plot(step, values(run.records, key), style, color=color, lw=1.4)
            if key in chance:
                axis.plot(step, chance[key], "--", color=color, lw=0.7)
        handles.append(line)
    for axis, title in zip(axes, COMPARED.values()):
        head(axis, title, note="")
    for axis in axes[4:]:  # a label of the figure would cover the legend
        axis.set_xlabel("optimizer step", fontsize=9)
    figure.legend(handles, legend_of(runs), loc="outside lower center", fontsize=8.5, frameon=False)
    return figure
