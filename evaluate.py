"""Numbers for what a checkpoint has learned: its segments, its slots, its features.

    python evaluate.py segmentation runs/toy                                    unseen toy scenes
    python evaluate.py segmentation last.pth --dataset coco_stuff --data-dir COCO         table 5
    python evaluate.py slots last.pth --data-dir COCO/val2017     occupied slots and how often each
    python evaluate.py probe last.pth --dataset voc --data-dir VOCdevkit   features, with labels
    python evaluate.py masks runs/photos PHOTOS --output MASKS      groups of a folder, as files

Slides: "Understanding the semantic grouping ability: unsupervised semantic segmentation";
"Statistics about the slots".
Paper: section 4, table 5.
Read next: visualize.py.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from engine import options
from engine.program import run_early, run_program
from measures.layouts import LABELED


def commands() -> options.Commands:
    """The subcommands with their options."""
    known = options.Commands("evaluate.py", __doc__)
    for name, text, size in (
        ("segmentation", "mIoU and accuracy of groups against labels, beside baselines", "320 224"),
        ("slots", "occupied slots per image, and how often each is occupied", "224"),
        ("probe", "linear and nearest-neighbor segmentation on frozen features", "320"),
    ):
        parser = known.add(name, text)
        options.add_checkpoint(parser)
        options.add_images(parser, "folder of the data set; not needed for toy scenes")
        add, several = parser.add_argument, dict(nargs="+") if name == "segmentation" else {}
        text = f"side of the images, px (default: {size}; toy scenes as drawn)"
        add("--size", type=options.side, metavar="N", help=text, **several)
        if name != "slots":
            add("--dataset", choices=tuple(LABELED), help="default: folder, or toy scenes")
            text = "part to measure on (default: val; all of a folder without parts)"
            add("--split", help=text)
            text = "folder: ids are below this (default: classes.txt, else the ids are counted)"
            add("--num-classes", type=options.positive, default=0, metavar="N", help=text)
    parser = known.add("masks", "the groups of photographs as files")
    options.add_checkpoint(parser)
    add = parser.add_argument
    add("photos", nargs="+", type=options.path, help="folders, files, *.txt with paths")
    add("--output", type=options.path, required=True, metavar="FOLDER", help="of the masks")
    text = "short side of what the network sees, px (default: 224)"
    add("--size", type=options.side, default=224, metavar="N", help=text)
    text = "text file of lines such as '3 sky'; with other names all masks are made again"
    add("--names", type=options.path, metavar="FILE", help=text)
    add("--workers", type=options.whole, default=0, metavar="N", help="processes that decode (0)")
    return known


if __name__ == "__main__":  # a misspelled option is answered before torch is loaded
    run_early("evaluate.py", commands().parse_args)

import torch
from torch.nn import Module

import toy
from engine.guards import lock
from measures import datasets, groups, masks, networks, probes, retrieval, streams


def measure_segmentation(args: argparse.Namespace) -> dict:
    """Groups against labels, at every size, beside the two baselines."""
    network, config, result = opened(args, networks.open_network)
    untrained = networks.untrained_network(config, args.device)
    labeled, k = open_labeled(args, args.split), config["num_prototypes"]
    if labeled.notice:
        print(f"note: {labeled.notice}")
    # 320 px is PiCIE's size [P], 224 px that of masks and figures [U].
    sizes = args.size or ([toy.Dials().size] if result["dataset"] == "toy" else [320, 224])
    shown = " and then ".join(f"{size} px" for size in sizes)
    print(f"measures {len(labeled)} images of {result['dataset']} at {shown}", flush=True)
    read = partial(streams.labeled_batches, batch_size=args.batch_size, workers=args.workers)
    some = torch.linspace(0, len(labeled) - 1, min(256, len(labeled))).long().tolist()
    batches = read(labeled.subset(some), sizes[0], title="k-means")
    by_color = groups.rgb_kmeans(groups.sample_pixels(images for _, (images, _) in batches), k)
    names = labeled.class_names
    result |= dict(images=len(labeled), num_prototypes=k, notice=labeled.notice, sizes={})
    result["classes"] = len(names)
    for size in sizes:
        batches = read(labeled, size, title=f"{size} px")
        report = groups.compare(network, untrained, by_color, batches, names)
        part = f" {args.split}" if args.split else ""
        print(f"\n{len(labeled)} images of {size} px, {result['dataset']}{part}, k = {k}")
        print(groups.format_table(report))
        if names:
            print(groups.format_classes(report))
        result["sizes"][size] = report
    return result


def measure_slots(args: argparse.Namespace) -> dict:
    """How many slots are occupied in an image, and how often each."""
    network, _, result = opened(args, networks.open_network)
    images = streams.open_images(result["dataset"], args.data_dir, args.limit)
    view = streams.center_view(args.size or streams.default_size(result["dataset"]))
    reading = dict(batch_size=args.batch_size, workers=args.workers)
    report = retrieval.slot_report(retrieval.retrieve(network, images, view, **reading))
    print(retrieval.format_slots(report))
    print("visualize.py prototypes --show extremes draws their best segments")
    return {**result, **report}


def measure_probe(args: argparse.Namespace) -> dict:
    """Linear and nearest-neighbor probes on frozen features, beside a random backbone."""
    backbone, config, result = opened(args, networks.open_backbone)
    if args.split == "train":
        raise ValueError("a probe learns on the split train: test on another --split, or none")
    learned, tested = open_labeled(args, "train"), open_labeled(args, args.split or "val")
    probes.check_parts(learned, tested)
    parts = "four parts: to learn and to test, with trained and with random weights"
    print(f"learns from {len(learned)} images, measures {len(tested)} others\n{parts}", flush=True)
    size = args.size or (toy.Dials().size if result["dataset"] == "toy" else 320)
    result.update(labeled_images=len(learned), images=len(tested), size=size)
    random = networks.untrained_backbone(config["arch"], args.device)
    read = partial(streams.labeled_batches, batch_size=args.batch_size, workers=args.workers)
    for row, network in (("trained", backbone), ("random_backbone", random)):
        to_learn = read(learned, size, title=f"{row}: learn")
        to_test = read(tested, size, title=f"{row}: test")
        result[row] = probes.probe(network, to_learn, len(learned), to_test, tested.class_names)
    if missing := result["trained"]["not_learned"]:
        print(f"note: tested, but with no label to learn from: {', '.join(missing)}")
    print(f"{len(learned)} labeled images, tested on {len(tested)} others, {size} px")
    print(probes.format_probes(result))
    return result


def measure_masks(args: argparse.Namespace) -> dict:
    """A mask for each photograph, and what is in all of them."""
    network, config = networks.open_network(args.checkpoint, args.network, args.device)
    streams.note_domain("folder", config)
    photos = streams.open_photographs(args.photos)
    masks.require_own(args.output)
    names = masks.read_names(args.names, config["num_prototypes"])
    options.check_writable(args.output / "prototypes.json", "--output")
    print(f"masks of {len(photos)} photographs, by step {config['step']} of {args.checkpoint}, in "
          f"{args.output}; after a stop the same command goes on")  # fmt: skip
    with lock(args.output):
        found = masks.write_masks(network, photos, args.output, args.size, names, args.workers)
    used = (prototype for prototype in found["prototypes"] if prototype["images"])
    used = sorted(used, key=lambda prototype: -prototype["share"])[:8]
    print(f"the {len(used)} most used of {config['num_prototypes']} prototypes")
    rows = {f"{p['prototype']} {p['name']}": [f"{p['share']:.1%}", str(p["images"])] for p in used}
    print(groups.table(rows, ["mean share", "photographs"]))
    print(f"{len(found['photos'])} photographs have a mask; prototypes.json and contact_sheet.jpg "
          f"in {args.output} are of these")  # fmt: skip
    return dict(checkpoint=str(args.checkpoint), output=str(args.output), **found)


def open_labeled(args: argparse.Namespace, split: str | None) -> datasets.Labeled:
    """The labeled images that the options ask for."""
    dataset = dataset_of(args)
    own = dict(num_classes=args.num_classes) if dataset == "folder" else {}
    labeled = datasets.open_labeled(dataset, args.data_dir, split, **own)
    return labeled.subset(streams.spaced(len(labeled), args.limit))


def dataset_of(args: argparse.Namespace) -> str:
    """--dataset; without it a folder if there is --data-dir, otherwise toy scenes."""
    return getattr(args, "dataset", None) or ("folder" if args.data_dir else "toy")


def opened(args: argparse.Namespace, open_part: Callable) -> tuple[Module, dict, dict]:
    """The network or backbone, its configuration, and what is measured, for the JSON."""
    module, config = open_part(args.checkpoint, args.network, args.device)
    dataset, data_dir = dataset_of(args), args.data_dir and str(args.data_dir)
    streams.note_domain(dataset, config)
    what = dict(checkpoint=str(args.checkpoint), network=args.network)
    part = getattr(args, "split", None)
    return module, config, dict(what, dataset=dataset, data_dir=data_dir, split=part)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    functions = dict(segmentation=measure_segmentation, slots=measure_slots, probe=measure_probe)
    functions["masks"] = measure_masks
    return run_program("evaluate.py", lambda words: commands().run(words, functions), argv)


if __name__ == "__main__":
    sys.exit(main())
