"""Figures of what a checkpoint has learned: prototypes, groups of images, the curves of training.

    python visualize.py prototypes last.pth --data-dir COCO/val2017     figure 3: the best segments
    python visualize.py groups last.pth photo1.jpg photo2.jpg   groups, soft assignments, features
    python visualize.py training runs/toy              curves, and how good ones look (figure 4)
    python visualize.py training runs/a runs/b         the same curves of several runs

Slide: "Understanding the semantic grouping ability: nearest neighbor visualization".
Paper: section 4, figures 3 and 4.
Read next: the notebooks.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from engine import options
from engine.program import run_early, run_program


def commands() -> options.Commands:
    """The subcommands with their options."""
    known = options.Commands("visualize.py", __doc__)
    size = "side, px (default: 224, as masks have; toy scenes as they are drawn)"
    parser = known.add("prototypes", "the best segments of each prototype, as in figure 3")
    options.add_checkpoint(parser)
    options.add_images(parser, "folder of images, nested or flat (COCO: val2017); else toy scenes")
    add = parser.add_argument
    add("--show", nargs="+", default=["used"], help="used (the default), extremes, or numbers")
    add("--count", type=options.positive, default=12, help="of the used (default: 12)")
    add("--top", type=options.positive, default=5, help="segments of each (default: 5)")
    add("--size", type=options.side, help=size)
    options.add_output(parser, "prototypes_FOLDER.png beside the checkpoint")
    parser = known.add("groups", "of images: groups, soft assignments, PCA")
    options.add_checkpoint(parser)
    add = parser.add_argument
    text = "files, a folder, or *.txt with paths (default: toy scenes)"
    add("images", nargs="*", default=[], type=options.path, help=text)
    add("--count", type=options.positive, default=6, help="of a folder, of scenes (default: 6)")
    add("--slots", type=options.positive, default=4, help="soft assignments (default: 4)")
    add("--size", type=options.side, help=size)
    options.add_output(parser, "groups_NAME.png beside the checkpoint")
    parser = known.add("training", "the curves of one run or several, beside chance")
    parser.add_argument("runs", nargs="+", type=options.path, metavar="RUN", help="their folders")
    options.add_output(parser, "training.png in the folder of the first run")
    return known


if __name__ == "__main__":  # a misspelled option is answered before torch is loaded
    run_early("visualize.py", commands().parse_args)

from torch import Tensor
from torch.nn import Module

from engine.images import Photographs
from measures import curves, figures, networks, retrieval, streams


def show_prototypes(args: Namespace) -> dict:
    """The best segments of each prototype."""
    images, file, view, network, _ = opened(args, args.limit)
    retrieval.check_choice(args.show, network.prototypes.num_embeddings)
    print(f"looks for the best segments in {len(images)} images (--limit N: in fewer)", flush=True)
    found = retrieval.retrieve(network, images, view, args.top, args.batch_size, args.workers)
    chosen = retrieval.choose_prototypes(found.active, args.show, args.count)
    figures.draw_prototypes(file, network, images, view, found, chosen)
    size, used = view.keywords["size"], int((found.active > 0).sum())
    print(f"figure: {file}; the network saw images of {size} px")
    if len(chosen) < used and args.show == ["used"]:
        print(f"{len(chosen)} of {used} prototypes in use are shown: --count {used} shows all")
    return dict(file=str(file), prototypes=chosen, images=len(images))


def show_groups(args: Namespace) -> dict:
    """Groups, soft assignments and features of images."""
    images, file, view, network, config = opened(args, args.count)
    views = streams.read_views(images, view)
    figures.draw_parts(file, network, views, config.get("temp_teacher", 0.07), args.slots)
    print(f"figure: {file}; the network saw images of {view.keywords['size']} px")
    return dict(file=str(file), images=len(views))


def opened(args: Namespace, count: int) -> tuple[Sequence[Tensor], Path, Callable, Module, dict]:
    """Images, the file of their figure, how they are shown, the network and its configuration.

    The named images, or `count` of a folder, or as many toy scenes. Raises ValueError.
    """
    named, folder = getattr(args, "images", []), getattr(args, "data_dir", None)
    if len(named) == 1 and (named[0].is_dir() or named[0].suffix == ".txt"):
        named, folder = [], named[0]
    if missing := [image for image in named if not image.is_file()]:
        raise ValueError(f"cannot read {missing[0]}: no such file")
    name = folder.absolute().name if folder else "toy_scenes"
    if named:
        name = named[0].stem + f"_and_{len(named) - 1}_more" * (len(named) > 1)
    network, config = networks.open_network(args.checkpoint, args.network, args.device)
    default = args.checkpoint.with_name(f"{args.command}_{name}.png")
    file = options.output_file(args.output, default)
    if file.resolve() in (image.resolve() for image in named):
        raise ValueError(f"--output {file} is one of the images: give another name")
    dataset = "folder" if named or folder else "toy"
    streams.note_domain(dataset, config)
    view = streams.center_view(args.size or streams.default_size(dataset))
    files = Photographs(".", list(map(str, named)))
    return files or streams.open_images(dataset, folder, count), file, view, network, config


def show_training(args: Namespace) -> dict:
    """The curves of one run, or of several in one figure."""
    runs = [curves.read_run(run) for run in args.runs]
    others = "".join(f"_{run.name}" for run in runs[1:4])
    name = f"training_with{others}" if others else "training"
    file = options.output_file(args.output, args.runs[0] / f"{name}.png")
    figures.save(curves.draw_runs(runs), file, 110)
    print(f"figure: {file}")
    return dict(file=str(file), last_steps=[run.records[-1]["step"] for run in runs])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    functions = dict(prototypes=show_prototypes, groups=show_groups, training=show_training)
    return run_program("visualize.py", lambda words: commands().run(words, functions), argv)


if __name__ == "__main__":
    sys.exit(main())
