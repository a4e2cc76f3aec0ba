"""Figures of what a checkpoint has learned: prototypes, groups of images, the course of training.

    python visualize.py prototypes last.pth --data-dir COCO/val2017     figure 3: the best segments
    python visualize.py groups last.pth photo1.jpg photo2.jpg   groups, soft assignments, features
    python visualize.py training runs/toy              curves, and how healthy ones look (figure 4)
    python visualize.py training runs/a runs/b         the same curves of several runs

Slides: "Understanding the semantic grouping ability: nearest neighbor visualization"; "Statistics
about the slots".
Paper: section 4, figures 3 and 4.
Differs: the released script also ranks images in which a prototype owns no pixel
(measures/retrieval.py); the other figures are ours [U].
Read next: the notebooks.
"""

from __future__ import annotations

import engine.interrupt  # noqa: F401  first: Ctrl-C while the others are loaded

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.command_line import (
    Commands,
    add_checkpoint,
    add_images,
    add_output,
    folder,
    output_file,
)
from engine.options import positive, side
from engine.program import path, run_program
from measures import curves, figures, retrieval
from measures.networks import open_network
from measures.streams import center_view, default_size, open_files, open_images, read_views

TEMPERATURE = 0.07  # of the soft assignment where the checkpoint names none [P]


def show_prototypes(args: argparse.Namespace) -> dict:
    """The best segments of each prototype."""
    file = output_file(args.output, args.checkpoint.with_name("prototypes.png"))
    network, config = open_network(args.checkpoint, args.network, args.device)
    dataset = "folder" if args.data_dir else "toy"
    images = open_images(dataset, args.data_dir, args.limit)
    view = center_view(args.size or default_size(dataset, config))
    found = retrieval.retrieve(network, images, view, args.top, args.batch_size, args.workers)
    chosen = retrieval.choose_prototypes(found.active, args.show, args.count)
    files = figures.draw_prototypes(file, network, images, view, found, chosen)
    return written(files, prototypes=chosen, images=len(images))


def show_groups(args: argparse.Namespace) -> dict:
    """Groups, soft assignments and features of some images."""
    file = output_file(args.output, args.checkpoint.with_name(f"groups_{name_of(args)}.png"))
    network, config = open_network(args.checkpoint, args.network, args.device)
    dataset = "folder" if args.images or args.data_dir else "toy"
    images = shown_images(args, dataset)
    views = read_views(images, center_view(args.size or default_size(dataset, config)))
    temperature = config.get("temp_teacher", TEMPERATURE)
    files = figures.draw_parts(file, network, views, temperature, args.slots)
    return written(files, images=len(images))


def show_training(args: argparse.Namespace) -> dict:
    """The curves of one run, or of several in one figure."""
    runs = [curves.read_run(run) for run in args.runs]
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    others = "_".join(run.name for run in runs[1:4])
    file = output_file(args.output, first / f"training{'_with_' if others else ''}{others}.png")
    figure = curves.draw_run(runs[0]) if len(runs) == 1 else curves.draw_comparison(runs)
    figure.savefig(file, dpi=110)
    for run in runs:
        if not run.config:
            print(f"no config.json beside the log of {run.name}: no chance lines are drawn")
    return written([file], records=[len(run.records) for run in runs],
                   last_steps=[run.records[-1]["step"] for run in runs])


def shown_images(args: argparse.Namespace, dataset: str) -> Sequence[Tensor]:
    """The named images; else the first of --data-dir or of the toy scenes."""
    return open_files(args.images) if args.images else open_images(
        dataset, args.data_dir, args.count)


def name_of(args: argparse.Namespace) -> str:
    """What a figure of groups shows, as a part of its name."""
    if not args.images:
        return args.data_dir.absolute().name if args.data_dir else "toy_scenes"
    more = f"_and_{len(args.images) - 1}_more" if len(args.images) > 1 else ""
    return args.images[0].stem + more


def written(files: list[Path], **result: Any) -> dict:
    """Print where the figures are; the result for the JSON."""
    print("\n".join(f"figure: {file}" for file in files))
    return dict(files=[str(file) for file in files], **result)


# --------------------------------------------------------------------------------- command line


def commands() -> Commands:
    """The subcommands with their options."""
    known = Commands("visualize.py", __doc__)
    size = "side, px (default: as in training; toy scenes as drawn)"

    parser = known.add("prototypes", show_prototypes,
                       "the best segments of each prototype, as in figure 3")
    add_checkpoint(parser)
    add_images(parser, "folder of images, nested or flat (COCO: its val2017); else toy scenes")
    parser.add_argument("--show", nargs="+", default=["used"],
                        help="used (most often occupied), extremes (five most, five least), all "
                             "that are in use, or numbers (default: used)")
    parser.add_argument("--count", type=positive, default=12,
                        help="how many of the most used (default: 12)")
    parser.add_argument("--top", type=positive, default=5,
                        help="segments per prototype (default: 5, as on the slide)")
    parser.add_argument("--size", type=side, help=size)
    add_output(parser, "prototypes.png beside the checkpoint")

    parser = known.add("groups", show_groups,
                       "for some images: groups, soft assignments, PCA of the features", "images")
    add_checkpoint(parser)
    parser.add_argument("images", nargs="*", type=path,
                        help="image files (default: the first of --data-dir, else toy scenes)")
    parser.add_argument("--data-dir", type=folder, help="folder of images, nested or flat")
    parser.add_argument("--count", type=positive, default=6,
                        help="images, where none is named (default: 6)")
    parser.add_argument("--slots", type=positive, default=4,
                        help="soft assignments per image, strongest first (default: 4)")
    parser.add_argument("--size", type=side, help=size)
    add_output(parser, "groups_NAME.png beside the checkpoint")

    parser = known.add("training", show_training,
                       "the curves of a run beside chance, or several runs in one figure", "runs")
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN",
                        help="output directory of a run, or its log.jsonl")
    add_output(parser, "training.png in the folder of the first run")
    return known


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return run_program("visualize.py", commands().run, argv, alone=True)


if __name__ == "__main__":
    sys.exit(main())
