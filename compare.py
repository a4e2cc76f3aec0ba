"""Run side by side what the talk sets SlotCon against: the same scenes, trunk, time and measures.

    python compare.py                                  everything, once: half an hour on a laptop
    python compare.py --minutes 5 --only moco slotcon  two systems, five minutes in all
    python compare.py --table 6a --seeds 3             the rows of a table of the slides, three
    times
    python compare.py --table collapse                 the ways not to collapse, each taken away

Writes comparison.json, and comparison.png: rows are systems, columns the same unseen scenes.
Slides: from "Image-level, pixel-level, and object-level contrastive learning" on; tables 6 and 8.
Paper: the related work and the ablations.
Differs: toy scenes and minutes, not COCO and weeks; SlotCon is train.py with `--group-starts 1`;
measures/systems.py says what the numbers mean.
Read next: comparisons/common.py. Side trip: recipes.py, which option is which row of a table.
"""

from __future__ import annotations

import engine.interrupt  # noqa: F401  first: Ctrl-C while the others are loaded

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import comparisons
import recipes
from comparisons.bench import LABELED, Bench, Entry, seconds_each
from comparisons.learn import Budget
from comparisons.scenes import Scenes
from engine import files, options
from engine.program import path, run_program
from measures import systems
from measures.comparison_image import save_comparison
from measures.labels import UNSEEN

MINUTES = 30.0  # per seed, where nothing else is asked for
SHOWN = 8  # scenes in the image


def run(args: argparse.Namespace, began: float) -> None:
    """Train and judge every row with every seed; what is done so far is always on disk."""
    entries = entries_of(args)
    toy = recipes.PRESETS["toy"]
    bench = Bench(toy.toy_scenes, args.scenes or toy.toy_test_scenes)
    rows: dict[str, list[dict]] = {entry.label: [] for entry in entries}
    shown: dict[str, Tensor] = {}
    seconds = 0.0
    for seed in range(args.seeds):
        drawing = time.perf_counter()
        bench.prepare(entries, seed)
        if seed == 0 and not args.steps:
            kinds, now = [entry.kind() for entry in entries], time.perf_counter()
            seconds = seconds_each(
                args.minutes, args.seeds, kinds, bench.judging, now - began, now - drawing
            )
        for entry in entries:
            record, groups = bench.row(entry, seed, Budget(seconds, args.steps), args.output_dir)
            rows[entry.label].append(record)
            shown.setdefault(entry.label, groups[:SHOWN])
            print(systems.brief(entry.label, record), flush=True)
            write(args, rows, seconds, time.perf_counter() - began)
    scenes = Scenes(UNSEEN, SHOWN)
    save_comparison(
        args.output_dir / "comparison.png",
        scenes.colors,
        scenes.semantic,
        scenes.regions,
        shown,
        f"{title(args)}: groups in scenes never trained on",
    )
    print(
        f"\n{title(args)}, median of {args.seeds} seed(s)\n{systems.format_table(rows)}\n\n"
        f"{time.perf_counter() - began:.0f} s in all; comparison.json and comparison.png are in "
        f"{args.output_dir}"
    )


def entries_of(args: argparse.Namespace) -> list[Entry]:
    """The rows that the command line asks for."""

    def entry(label, name, variant, given=(), arguments=(), preset="scene") -> Entry:
        # One start of the groups for all: no other system has a second one.
        c, _ = recipes.parse(["--preset", "toy", "--group-starts", "1", *given], __doc__)
        return Entry(
            label,
            name,
            variant,
            dataclasses.asdict(c),
            dict(arguments),
            recipes.crops_of(c),
            recipes.photometric_of(c),
            preset,
        )

    if args.table:
        return [
            entry(row.label, row.system, row.label, row.toy, row.arguments)
            for row in recipes.TABLES[args.table][1]
        ]
    entries = []
    for name in args.only or comparisons.SYSTEMS:
        for variant in comparisons.VARIANTS.get(name, (comparisons.Variant(),)):
            label = f"{name}: {variant.label}" if variant.label else name
            entries.append(entry(label, name, variant.label, (), variant.arguments, variant.preset))
    return entries


def title(args: argparse.Namespace) -> str:
    """What is compared."""
    return f"Table {args.table}: {recipes.TABLES[args.table][0]}" if args.table else "All systems"


def write(
    args: argparse.Namespace, rows: dict[str, list[dict]], seconds: float, spent: float
) -> None:
    """comparison.json: the records of every row, by name of the system or by label of the table."""
    by_name: dict[str, list[dict]] = {}
    for label, records in rows.items():
        for record in records:
            by_name.setdefault(label if args.table else record["system"], []).append(record)
    files.write_json(
        args.output_dir / "comparison.json",
        dict(
            table=args.table or "",
            seeds=args.seeds,
            minutes=args.minutes,
            steps=args.steps,
            training_seconds_each=seconds,
            seconds=spent,
            labeled_scenes=LABELED,
            k=recipes.PRESETS["toy"].num_prototypes,
            systems=by_name,
        ),
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError with one line."""
    parser = options.Parser(
        "compare.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=tuple(comparisons.SYSTEMS),
        metavar="NAME",
        help=f"these systems: {', '.join(comparisons.SYSTEMS)}",
    )
    add("--table", choices=tuple(recipes.TABLES), help="the rows of a table of the slides instead")
    add("--seeds", type=options.positive, default=1, help="with the seeds 0 .. N-1 (default: 1)")
    add(
        "--minutes",
        type=float,
        help="wall time of the whole command, evaluation included; every "
        f"row has equal training seconds (default: {MINUTES:g} per seed)",
    )
    add("--steps", type=options.whole, default=0, help="equal steps for every row instead")
    add("--scenes", type=options.whole, default=0, help="unseen scenes; 0: as many as the preset")
    add("--output-dir", type=path, default=Path("runs/compare"), help="default: runs/compare")
    args = parser.parse_args(argv)
    if args.only and args.table:
        raise ValueError("--only names systems and --table rows of SlotCon: give one of them")
    if args.minutes is not None and (args.steps or not args.minutes > 0):
        raise ValueError(f"--minutes is positive and excludes --steps, found {args.minutes:g}")
    args.minutes = args.minutes or MINUTES * args.seeds
    return args


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status."""
    began = time.perf_counter()
    args = parse(argv)
    torch.set_num_threads(recipes.PRESETS["toy"].threads or 1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    run(args, began)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("compare.py", main, alone=True))
