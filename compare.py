"""Run side by side what the talk sets SlotCon against: the same toy scenes, steps and measures.

    python compare.py                                  every system, once, 1,000 steps each
    python compare.py --only moco slotcon --steps 200  two systems, a quick look
    python compare.py --table 6a --seeds 3             three times the rows of a table of the slides
    python compare.py --table collapse                 the ways not to collapse, each taken away

As many rows as cores are trained at a time. All rows share the backbone but those of slots, which
have an encoder of their own and four times the scenes. Writes comparison.json, the weights of every
row and seed, and comparison.png: rows are systems, columns the same unseen scenes.
Slides: from "Image-level, pixel-level, and object-level contrastive learning" on; tables 6 and 8.
Paper: the related work and the ablations.
Read next: comparisons/common.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import comparisons
import recipes
from engine import options
from engine.program import BEGAN, run_early, run_program

STEPS = 1000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, without torch. Raises ValueError with one line."""
    parser = options.Parser("compare.py", description=__doc__)
    names = tuple(comparisons.SYSTEMS)
    add = parser.add_argument
    text = f"these systems: {', '.join(names)}"
    add("--only", nargs="+", choices=names, metavar="NAME", help=text)
    text = f"the rows of a table of the slides instead: {', '.join(recipes.TABLES)}"
    add("--table", choices=tuple(recipes.TABLES), metavar="NAME", help=text)
    text = "with the seeds 0 .. N-1 (default: 1)"
    add("--seeds", type=options.positive, default=1, metavar="N", help=text)
    text = f"optimizer steps of every row (default: {STEPS})"
    add("--steps", type=options.positive, default=STEPS, metavar="N", help=text)
    text = "default: runs/compare, with the names of --only or --table behind it"
    add("--output-dir", type=options.path, help=text)
    args = parser.parse_args(argv)
    if args.only and args.table:
        raise ValueError("--only names systems and --table rows of SlotCon: give one of them")
    names = args.only or ([args.table] if args.table else [])
    args.output_dir = args.output_dir or Path("runs", "-".join(["compare", *names]))
    return args


if __name__ == "__main__":  # a misspelled option is answered before torch is loaded
    run_early("compare.py", parse)

import numpy as np
import torch

from comparisons import judge
from comparisons.bench import LABELED, SHOWN, Entry, draw, in_processes
from engine import files
from engine.folder import put_away
from measures import metrics
from measures.datasets import UNSEEN
from measures.figures import as_images, color_groups, grid, prototype_colors, save


def entries_of(args: argparse.Namespace) -> list[Entry]:
    """The rows that the command line asks for."""
    if args.table:
        return [
            Entry(label_of(row), row.system, configuration(args.steps, row.toy), row.arguments)
            for row in recipes.TABLES[args.table][1]
        ]
    return [
        Entry(label, name, configuration(args.steps), arguments, preset)
        for name in comparisons.SYSTEMS  # those of slots come first
        if not args.only or name in args.only
        for label, arguments, preset in comparisons.VARIANTS[name]
    ]


def label_of(row: recipes.Row) -> str:
    """The slide's, and the value on toy scenes where it is another one."""
    if row.toy == row.options or row.system != "slotcon":
        return row.label
    return f"{row.label} (toy: {' '.join(word for word in row.toy if word[0] != '-')})"


def configuration(steps: int, changes: Sequence[str] = ()) -> recipes.Config:
    """The preset toy with this length and these options; each row has a core to itself."""
    words = ["--preset", "toy", "--steps", str(steps), "--workers", "0"]
    return recipes.parse([*words, *changes])[0]


def run(args: argparse.Namespace, entries: Sequence[Entry]) -> None:
    """Train and judge every row with every seed; what is done so far is always on disk."""
    title = ", ".join(args.only or ["All systems"])
    title = f"Table {args.table}: {recipes.TABLES[args.table][0]}" if args.table else title
    title += f" ({args.steps} steps: too few to judge)" if args.steps < STEPS else ""
    k, scenes = recipes.PRESETS["toy"].num_prototypes, draw(UNSEEN, SHOWN)
    shown = {"scene": as_images(scenes.colors)}
    records: dict[str, list[dict]] = {entry.label: [] for entry in entries}
    result = dict(table=args.table or "", seeds=args.seeds, steps=args.steps, k=k)
    result.update(labeled_scenes=LABELED, rows=records)
    jobs = [(entry, seed) for seed in range(args.seeds) for entry in entries]
    print(f"{len(jobs)} rows of {args.steps} steps; a second start begins with row 1 again\n"
          f"each one done is written to {args.output_dir}/comparison.json", flush=True)  # fmt: skip
    for (entry, _), (record, groups) in zip(jobs, in_processes(jobs, args.output_dir)):
        records[entry.label].append(record)
        if entry.preset != "scene":
            seen = draw(UNSEEN, SHOWN, preset=entry.preset)
            shown.setdefault(f"scene: {entry.preset}", as_images(seen.colors))
        # Slots have no names: group 3 of one image is not group 3 of another
        alone = record["grouped_by"] != record["named_by"]
        truth, size = (scenes.regions, 1) if alone else (scenes.semantic, SHOWN)
        colors = prototype_colors(int(truth.max()) + 1)
        shown.setdefault(f"truth: {'objects' if alone else 'classes'}", colors[truth])
        pairs = zip(torch.from_numpy(groups).split(size), truth.split(size))
        painted = np.concatenate([color_groups(*pair) for pair in pairs])
        shown.setdefault(entry.label + " *" * (record["grouped_by"] == judge.CLUSTERS), painted)
        result["seconds"] = time.perf_counter() - BEGAN
        files.write_json(args.output_dir / "comparison.json", result)
        print(judge.brief(entry.label, record), flush=True)
    file = args.output_dir / "comparison.png"
    what = "Groups in scenes never trained on, in the color of what they match in the truth above\n"
    starred = any(name.endswith("*") for name in shown)
    what += "Other colors match nothing" + f"; * of {judge.CLUSTERS}" * starred
    save(grid(f"{title}\n{what}", list(shown.values()), list(shown), side=0.8), file, 130)
    print(f"\n{title}, median of {args.seeds} seed(s)\n{judge.format_table(records)}")
    unseen = draw(UNSEEN, recipes.PRESETS["toy"].held_out)  # slots must find more than places
    instances = metrics.rand_index(unseen.blocks, unseen.regions)
    objects = metrics.rand_index(unseen.blocks, unseen.regions, unseen.instance > 0)
    print(f"2 x 4 blocks know the place only: obj. {objects:.3f}, inst. {instances:.3f}\n")
    print(f"done     {result['seconds']:.0f} s; comparison.json and {file}")


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    args = parse(argv)
    options.check_writable(args.output_dir / "comparison.json", "--output-dir")
    if (args.output_dir / "comparison.json").exists():
        put_away(args.output_dir)
    torch.set_num_threads(recipes.PRESETS["toy"].threads or 1)
    run(args, entries_of(args))
    return 0


if __name__ == "__main__":
    sys.exit(run_program("compare.py", main))
