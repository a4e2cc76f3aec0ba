"""Write a pretrained backbone for other libraries, and prove that the file gives the same features.

    python export.py runs/coco-r50/last.pth --format torchvision --output resnet50.pth
    python export.py runs/coco-r50/last.pth --format detectron2 --output detectron2.pkl

torchvision's names serve timm and mmsegmentation too; a backbone of timm keeps timm's.

Slides: tables 2, 3, 4 and 7.
Paper: section 4.2.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from engine import options
from engine.program import Stopped, run_early, run_program


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError with one line."""
    parser = options.Parser("export.py", description=__doc__)
    add, text = parser.add_argument, "last.pth of a run, a released checkpoint, or backbone.pth"
    add("checkpoint", type=options.checkpoint_path, help=text)
    add("--format", choices=("torchvision", "detectron2"), default="torchvision", help="its names")
    text = "file to write: *.pth, *.safetensors, and for detectron2 *.pkl, numpy arrays"
    add("--output", type=options.path, required=True, help=text)
    add("--network", choices=("teacher", "student"), default="teacher", help="which of the two")
    args = parser.parse_args(argv)
    source, output = args.checkpoint, args.output
    if source.is_file() and output.is_file() and output.samefile(source):
        raise ValueError(f"--output {output} is the checkpoint itself: give another name")
    if output.is_file() and output.name == "last.pth":
        raise ValueError(f"--output {output} is the last.pth of a run: give another name")
    kinds = (".pkl",) if args.format == "detectron2" else (".pth", ".safetensors")
    if output.suffix not in kinds:
        expected = "*.pth or *.safetensors, and *.pkl with --format detectron2"
        raise ValueError(f"--output {output}: expected {expected}")
    if output.suffix == ".safetensors" and not importlib.util.find_spec("safetensors"):
        raise ValueError("*.safetensors needs it: pip install safetensors")
    return args


if __name__ == "__main__":  # a misspelled option is answered before torch is loaded
    run_early("export.py", parse)

import torch

from backbone import RESNETS, TIMM
from downstream import exported
from engine import files
from measures.networks import open_backbone
from photometric import IMAGENET_MEAN, IMAGENET_STD


def main(argv: Sequence[str] | None = None) -> int:
    """Read, write, prove, and say what was done."""
    args = parse(argv)
    backbone, config = open_backbone(args.checkpoint, args.network)
    arch, state = config["arch"], backbone.state_dict()
    form = "timm" if arch.startswith(TIMM) and args.format == "torchvision" else args.format
    if arch not in RESNETS and form != "timm":
        ways = "train with --arch resnet18, for example; docs/transfer.md shows how to use it here"
        if arch.startswith(TIMM):
            ways = "leave --format out: the file has timm's names then"
        elif args.format == "torchvision":
            ways = f"networks of timm, too: {ways}"
        known = f"--format {args.format} has {', '.join(RESNETS)}"
        raise ValueError(f"{args.checkpoint} holds the backbone {arch}, but {known}; {ways}")
    options.check_writable(args.output, "--output")
    contents = exported.encoded(state, args.output.suffix)
    size = (224, 224) if form == "timm" else (97, 129)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    other = exported.decoded(contents, arch, args.output.suffix)
    with torch.inference_mode():
        features = backbone(image)
        same = torch.equal(features.flatten(1), other(image))
    if not same:
        raise Stopped(f"{args.output} would give other features than the checkpoint: not written")
    files.write_atomically(args.output, lambda file: file.write(contents))
    print(f"read     {config['source']}: {arch}, {len(state)} tensors")
    print(f"written  {args.output}, under {form}'s names")
    print(f"proved   features {(*features.shape,)} of a random image are identical")
    if form == "torchvision":
        print(f"needs    RGB in 0..1, minus {IMAGENET_MEAN}, over {IMAGENET_STD}")
    elif form == "timm":
        print("needs    images as the pretrained_cfg of that network says")
    else:
        depth = int(arch.removeprefix("resnet"))
        small = "; MODEL.RESNETS.RES2_OUT_CHANNELS 64" * (depth < 50)
        print(f"needs    {exported.DETECTRON2_SETTINGS}; MODEL.RESNETS.DEPTH {depth}{small}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program("export.py", main))
