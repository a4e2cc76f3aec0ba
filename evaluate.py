"""Numbers for what a checkpoint has learned: its segments, its slots, its features.

    python evaluate.py segmentation runs/toy                                    unseen toy scenes
    python evaluate.py segmentation last.pth --dataset coco_stuff --data-dir COCO         table 5
    python evaluate.py slots last.pth --data-dir COCO/val2017     occupied slots and how often each
    python evaluate.py probe last.pth --dataset voc --data-dir VOCdevkit   features, with labels

Slides: "Understanding the semantic grouping ability: unsupervised semantic segmentation";
"Statistics about the slots".
Paper: section 4, table 5.
Differs: the authors released none of this. Segmentation follows PiCIE's published protocol [P],
which they say they used (measures/metrics.py); the baselines and the probes are ours [U].
Read next: visualize.py.
"""

from __future__ import annotations

import engine.interrupt  # noqa: F401  first: Ctrl-C while the others are loaded

import argparse
import sys
from pathlib import Path

import toy
from engine.command_line import (
    Commands,
    add_checkpoint,
    add_images,
    add_output,
    list_file,
    output_file,
)
from engine.options import positive, side, whole
from engine.program import run_program
from measures import color_groups, grouping_report, labels, networks, probes, slot_statistics
from measures.streams import center_view, default_size, labeled_batches, open_images, spaced, stream


def measure_segmentation(args: argparse.Namespace) -> dict:
    """Groups against labels, at every size, beside the two baselines."""
    network, config = networks.open_network(args.checkpoint, args.network, args.device)
    note_toy_scenes(args, config)
    untrained = networks.untrained_network(**networks.sizes_of(config), device=args.device)
    labeled, k = open_labeled(args), config["num_prototypes"]
    reading = (args.batch_size, args.workers)
    # 320 px is PiCIE's size [P], 224 px that of training [U].
    sizes = args.size or ([toy.Dials().size] if args.dataset == "toy" else [320, 224])
    by_color = color_groups.fit_to(labeled, sizes[0], k, *reading)
    if labeled.notice:
        print(f"note: {labeled.notice}")
    reports = {}
    for size in sizes:
        batches = labeled_batches(labeled, size, *reading, f"{size} px")
        report = grouping_report.compare(network, untrained, by_color, batches, labeled.class_names)
        print(f"\n{len(labeled)} images of {size} px, {args.dataset}, k = {k}")
        print(grouping_report.format_table(report))
        if labeled.class_names:
            print(grouping_report.format_classes(report))
        reports[size] = report
    return dict(source(args), images=len(labeled), num_prototypes=k, notice=labeled.notice,
                classes=len(labeled.class_names), sizes=reports)


def measure_slots(args: argparse.Namespace) -> dict:
    """How many slots are occupied in an image, and how often each."""
    file = output_file(args.output, args.checkpoint.with_name("slots.png"))
    network, config = networks.open_network(args.checkpoint, args.network, args.device)
    dataset = dataset_of(args)
    images = open_images(dataset, args.data_dir, args.limit)
    view = center_view(args.size or default_size(dataset, config))
    batches = stream(images, view, args.batch_size, args.workers, "slots")
    report = slot_statistics.slot_report(*slot_statistics.slot_counts(network, batches))
    slot_statistics.draw_slots(file, report)
    print(slot_statistics.format_slots(report))
    print(f"figure: {file}; visualize.py prototypes --show extremes draws their best segments")
    return dict(source(args), **report, files=[str(file)])


def measure_probe(args: argparse.Namespace) -> dict:
    """Linear and nearest-neighbor probes on frozen features, beside a random backbone."""
    trunk, config = networks.open_trunk(args.checkpoint, args.network, args.device)
    note_toy_scenes(args, config)
    learned, tested = open_parts(args)
    size = args.size or (toy.Dials().size if args.dataset == "toy" else 320)
    result = dict(source(args), labeled_images=len(learned), images=len(tested), size=size)
    random_trunk = networks.untrained_trunk(config["arch"], args.device)
    for row, backbone in (("trained", trunk), ("random_backbone", random_trunk)):
        to_learn, to_test = (
            labeled_batches(part, size, args.batch_size, args.workers, f"{row}: {title}")
            for part, title in ((learned, "learn"), (tested, "test")))
        result[row] = probes.probe(backbone, to_learn, len(learned), to_test, tested.class_names)
    print(f"{len(learned)} labeled images, tested on {len(tested)} others, {size} px")
    print(probes.format_probes(result))
    return result


# --------------------------------------------------------------------------------- what is measured


def open_labeled(args: argparse.Namespace, split: str | None = None) -> labels.Labeled:
    """The labeled images that the options ask for."""
    own = dict(
        toy=dict(count=args.toy_scenes, preset=args.toy_preset),
        coco_stuff=dict(list_file=args.list),
        folder=dict(num_classes=args.num_classes),
    )
    args.dataset = dataset_of(args)
    options = own.get(args.dataset, {})
    labeled = labels.open_labeled(args.dataset, args.data_dir, split or args.split, **options)
    return labeled.subset(spaced(len(labeled), args.limit)) if args.limit else labeled


def open_parts(args: argparse.Namespace) -> tuple[labels.Labeled, labels.Labeled]:
    """The images that a probe learns from, and those that it is tested on."""
    if args.split == "train":
        raise ValueError("a probe learns on the split train: test it on another one, or leave "
                         "--split out")
    learned, tested = open_labeled(args, "train"), open_labeled(args, args.split or "val")
    probes.check_parts(learned, tested)
    shared = len(files_of(learned) & files_of(tested))
    if shared:  # VOC's trainval; images/test of a folder without train, which learns from all
        raise ValueError(f"{shared} images of the split {args.split or 'val'} are among those to "
                         "learn from: test on another split, or leave --split out")
    return probes.pick_at_random(learned, args.labeled), tested


def files_of(labeled: labels.Labeled) -> set[Path]:
    """The image files; of toy scenes, which are drawn, none."""
    if isinstance(labeled.images, labels.ToyScenes):
        return set()
    indices = range(len(labeled.images)) if labeled.indices is None else labeled.indices
    return {Path(labeled.images.root, labeled.images.name(index)) for index in indices}


def dataset_of(args: argparse.Namespace) -> str:
    """--dataset; without it a folder if there is --data-dir, else toy scenes."""
    return args.dataset or ("folder" if args.data_dir else "toy")


def note_toy_scenes(args: argparse.Namespace, config: dict) -> None:
    """Say so where photographs were trained on and toy scenes are measured on."""
    if dataset_of(args) == "toy" and config.get("dataset", "toy") != "toy":
        print(f"note: trained on {config['dataset']}, measured on toy scenes; --data-dir FOLDER "
              "measures on labeled images")


def source(args: argparse.Namespace) -> dict:
    """What was measured, for the JSON."""
    data_dir = str(args.data_dir) if args.data_dir else None
    return dict(checkpoint=str(args.checkpoint), network=args.network, dataset=dataset_of(args),
                data_dir=data_dir)


# --------------------------------------------------------------------------------- command line


def commands() -> Commands:
    """The subcommands with their options."""
    known = Commands("evaluate.py", __doc__)
    for name, command, text in (
        ("segmentation", measure_segmentation,
         "mIoU and accuracy of groups against labels, beside two baselines"),
        ("slots", measure_slots, "how many slots are occupied per image, and how often each"),
        ("probe", measure_probe, "linear and nearest-neighbor segmentation on frozen features"),
    ):
        parser = known.add(name, command, text)
        add_checkpoint(parser)
        add_images(parser, "folder of the data set; not needed for toy scenes")
        add = parser.add_argument
        if name == "slots":
            add("--dataset", choices=("folder", "toy"),
                help="default: folder with --data-dir, else toy")
            add("--size", type=side,
                help="side, px (default: as in training; toy scenes as drawn)")
            add_output(parser, "slots.png beside the checkpoint")
            continue
        add("--dataset", choices=tuple(labels.DATASETS),
            help="default: folder with --data-dir, else toy")
        add("--split", help="part to measure on (default: val; all of a folder without parts)")
        several = dict(nargs="+") if name == "segmentation" else {}
        default = "320 224" if several else "320"
        add("--size", type=side, **several,
            help=f"side, px (default: {default}; toy scenes as drawn)")
        add("--list", type=list_file,
            help="coco_stuff: file of image ids, one per line (default: the curated ones, by rule)")
        add("--num-classes", type=positive,
            help="folder: ids are below this (default: classes.txt, else the ids are counted)")
        add("--toy-scenes", type=positive, default=256, help="toy: how many (default: 256)")
        add("--toy-preset", choices=tuple(toy.PRESETS), default="scene",
            help="toy: which kind (default: scene)")
        if name == "probe":
            add("--labeled", type=whole, default=0,
                help="learn from N random labeled images only; 0: all (default: 0)")
    return known


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return run_program("evaluate.py", commands().run, argv, alone=True)


if __name__ == "__main__":
    sys.exit(main())
