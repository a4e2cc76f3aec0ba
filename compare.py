"""Run side by side what the talk sets SlotCon against: same scenes, trunk, views, time and measures.

    python compare.py                                    everything, once: half an hour on a laptop
    python compare.py --minutes 5 --only moco slotcon    two systems, five minutes in all
    python compare.py --table 6a --seeds 3               the rows of a table of the slides, three times
    python compare.py --table collapse                   the ways not to collapse, taken away one by one

Writes comparison.json, and comparison.png: rows are systems, columns the same unseen scenes.
Slides: from "Image-level, pixel-level, and object-level contrastive learning" on; tables 6 and 8.
Paper: the related work and the ablations.
Differs: toy scenes and minutes, not COCO and weeks; what a number means stands in measures/systems.py.
Read next: comparisons/common.py. Side trip: recipes.py, which option is which row of a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import comparisons
import recipes
import toy
from comparisons.common import System
from comparisons.learn import Budget, learn
from comparisons.scenes import Scenes
from engine import files, options
from engine.program import path, run_program
from measures import systems
from measures.comparison_image import save_comparison
from measures.labels import UNSEEN
from recipes import Config

MINUTES = 30.0  # per seed, where nothing else is asked for
LABELED = 16  # scenes that the probe learns from
SHOWN = 8  # scenes in the image
STARTING = 1.0  # seconds that a system takes to start and to end its worker process


class Entry(NamedTuple):
    """A row: what is trained, and on what."""

    label: str
    name: str  # of the system
    variant: str  # "" where the system has one row
    c: Config
    arguments: Mapping[str, Any]  # of this system alone
    preset: str = "scene"  # of toy.py

    def build(self, seed: int) -> System:
        torch.manual_seed(seed)
        settings = {**dataclasses.asdict(self.c), "seed": seed,
                    "steps_per_epoch": self.c.toy_scenes // self.c.batch_size}
        system = comparisons.build(self.name, settings, **self.arguments)
        return system.to(memory_format=torch.channels_last) if self.c.channels_last else system


def entries_of(args: argparse.Namespace) -> list[Entry]:
    """The rows that the command line asks for."""
    if args.table:
        return [Entry(row.label, row.system, row.label, toy_config(row.toy), dict(row.arguments))
                for row in recipes.TABLES[args.table][1]]
    entries = []
    for name in args.only or comparisons.SYSTEMS:
        for variant in comparisons.VARIANTS.get(name, (comparisons.Variant(),)):
            label = f"{name}: {variant.label}" if variant.label else name
            entries.append(Entry(label, name, variant.label, toy_config(()), variant.arguments,
                                 variant.preset))
    return entries


def toy_config(given: tuple[str, ...]) -> Config:
    return recipes.parse(["--preset", "toy", *given], __doc__)[0]


class Scenery:
    """Scenes, each kind drawn once per seed."""

    def __init__(self, count: int, test_count: int):
        self.count, self.test_count, self.drawn = count, test_count, {}

    def train(self, seed: int, system: System, preset: str) -> Scenes:
        key = (seed, system.sees, system.told, preset)
        if key not in self.drawn:
            self.drawn = {k: v for k, v in self.drawn.items() if k[0] in (seed, UNSEEN, UNSEEN + 1)}
            self.drawn[key] = Scenes(seed, self.count, system.sees, system.told, preset)
        return self.drawn[key]

    def truth(self, seed: int, count: int, system: System, preset: str) -> systems.Truth:
        key = (seed, system.sees, "", preset)
        if key not in self.drawn:
            self.drawn[key] = Scenes(seed, count, system.sees, "", preset)
        scenes = self.drawn[key]
        return systems.Truth(scenes.images, scenes.semantic, scenes.regions, scenes.instance)

    def judge(self, system: System, entry: Entry) -> tuple[dict[str, Any], torch.Tensor]:
        """All measures of a system on unseen scenes, and its groups."""
        system.eval()
        return systems.judge(
            system.trunk, system.maps, system.per_image,
            self.truth(UNSEEN, self.test_count, system, entry.preset),
            self.truth(UNSEEN + 1, LABELED, system, entry.preset),
            entry.c.num_prototypes, len(toy.CLASS_NAMES))


def untrained(entries: list[Entry], seed: int, scenery: Scenery) -> dict[tuple, dict[str, Any]]:
    """The measures before training, by kind of entry; systems that start alike are measured once."""
    found = {}
    for entry in entries:
        system = entry.build(seed)
        scenery.train(seed, system, entry.preset)
        if (key := kind(entry, system)) not in found:
            scenery.truth(UNSEEN, scenery.test_count, system, entry.preset)
            began = time.perf_counter()
            measures, _ = scenery.judge(system, entry)
            found[key] = {**measures, "judging_seconds": time.perf_counter() - began}
    return found


def kind(entry: Entry, system: System) -> tuple:
    """Entries of one kind look alike before training: all build their trunk first, from one seed."""
    named = "" if system.per_image else type(system).maps is not System.maps
    return system.sees, entry.preset, named, entry.c.num_prototypes


def seconds_each(
    args: argparse.Namespace, entries: list[Entry], before: dict, began: float, prepared: float
) -> float:
    """Equal training seconds for all: what is left of --minutes after drawing and judging.

    began: the program's start; prepared: seconds that the first seed took to draw and to judge what
    is untrained. Raises ValueError where nothing is left.
    """
    judging = sum(before[kind(entry, entry.build(0))]["judging_seconds"] for entry in entries)
    total = args.minutes * 60 - (time.perf_counter() - began) - (args.seeds - 1) * prepared
    total -= args.seeds * (1.2 * judging + STARTING * len(entries)) + 5
    seconds = total / (args.seeds * len(entries))
    if seconds < 1:
        short = (1 - seconds) * args.seeds * len(entries) / 60
        raise ValueError(f"--minutes {args.minutes:g} leaves no second of training to each of "
                         f"{len(entries)} rows and {args.seeds} seed(s): {args.minutes + short:.1f} would")
    return seconds


def run(args: argparse.Namespace, began: float) -> None:
    """Train and judge every row with every seed; what is done so far is always on disk."""
    entries = entries_of(args)
    scenery = Scenery(entries[0].c.toy_scenes, args.scenes or entries[0].c.toy_test_scenes)
    rows: dict[str, list[dict]] = {entry.label: [] for entry in entries}
    shown: dict[str, torch.Tensor] = {}
    seconds = 0.0
    for seed in range(args.seeds):
        drawing = time.perf_counter()
        before = untrained(entries, seed, scenery)
        if seed == 0 and not args.steps:
            seconds = seconds_each(args, entries, before, began, time.perf_counter() - drawing)
        for entry in entries:
            system = entry.build(seed)
            scenes = scenery.train(seed, system, entry.preset)
            settings = {**dataclasses.asdict(entry.c), "seed": seed}
            trained = learn(system, scenes, recipes.crops_of(entry.c), recipes.photometric_of(entry.c),
                            settings, Budget(seconds, args.steps), args.output_dir)
            measures, groups = scenery.judge(system, entry)
            first = before[kind(entry, system)]
            record = dict(system=entry.name, variant=entry.variant, seed=seed, **measures, **trained,
                          untrained={key: first[key] for key in systems.MEASURES},
                          collapsed=systems.collapsed(measures, first))
            rows[entry.label].append(record)
            shown.setdefault(entry.label, groups[:SHOWN])
            print(f"seed {seed}  {entry.label:<28} mIoU {record['miou']:.3f}  NMI {record['nmi']:.3f}  "
                  f"probe {record['probe_miou']:.3f}  {record['steps']} steps in {record['seconds']:.0f} s"
                  + ("  collapsed" if record["collapsed"] else ""), flush=True)
            write(args, rows, seconds, time.perf_counter() - began)
    draw(args, entries, scenery, shown)
    print(f"\n{table_title(args)}\n{systems.format_table({k: v for k, v in rows.items() if v})}")
    print(f"\n{time.perf_counter() - began:.0f} s in all; numbers are in "
          f"{args.output_dir / 'comparison.json'}, the image is {args.output_dir / 'comparison.png'}")


def table_title(args: argparse.Namespace) -> str:
    title = f"Table {args.table}: {recipes.TABLES[args.table][0]}, on toy scenes" if args.table else (
        "Systems on toy scenes")
    return f"{title}, median of {args.seeds} seed(s)"


def write(args: argparse.Namespace, rows: dict[str, list[dict]], seconds: float, spent: float) -> None:
    """comparison.json: the records of every row, by file name of the system or by label of the table."""
    by_name: dict[str, list[dict]] = {}
    for label, records in rows.items():
        for record in records:
            by_name.setdefault(label if args.table else record["system"], []).append(record)
    preset = recipes.PRESETS["toy"]
    files.write_json(args.output_dir / "comparison.json", dict(
        table=args.table or "", seeds=args.seeds, minutes=args.minutes, steps=args.steps,
        training_seconds_each=seconds, seconds=spent, k=preset.num_prototypes,
        labeled_scenes=LABELED, systems=by_name))


def draw(args: argparse.Namespace, entries: list[Entry], scenery: Scenery, shown: dict) -> None:
    """comparison.png: seed 0."""
    scenes = Scenes(UNSEEN, SHOWN)
    save_comparison(args.output_dir / "comparison.png", scenes.colors, scenes.semantic, scenes.regions,
                    shown, f"{table_title(args)}: groups in scenes never trained on")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError with one line."""
    parser = options.Parser("compare.py", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(comparisons.SYSTEMS), metavar="NAME",
        help=f"these systems: {', '.join(comparisons.SYSTEMS)}")
    add("--table", choices=tuple(recipes.TABLES), help="instead, the rows of a table of the slides")
    add("--seeds", type=options.positive, default=1, help="run everything with the seeds 0 .. N-1 (1)")
    add("--minutes", type=float, help="wall time of the whole command, evaluation included, of which "
        f"every row has equal training seconds (default: {MINUTES:g} per seed)")
    add("--steps", type=options.whole, default=0, help="instead, equal steps for every row")
    add("--scenes", type=options.whole, default=0, help="unseen scenes to judge on; 0: the preset's")
    add("--output-dir", type=path, default=Path("runs/compare"), help="runs/compare")
    args = parser.parse_args(argv)
    if args.only and args.table:
        raise ValueError("--only names systems and --table rows of SlotCon: give one of them")
    if args.minutes is not None and (args.steps or not args.minutes > 0):
        raise ValueError(f"--minutes is a positive number and goes without --steps, found {args.minutes}")
    args.minutes = args.minutes or MINUTES * args.seeds
    return args


def main(argv: list[str] | None = None) -> int:
    began = time.perf_counter()
    args = parse(argv)
    torch.set_num_threads(recipes.PRESETS["toy"].threads or 1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    run(args, began)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("compare.py", main))
