"""Write a pretrained trunk for other libraries, and prove that the file gives the same features
there.

    python export.py runs/coco/last.pth --format torchvision --output resnet50.pth
    python export.py runs/coco/last.pth --format detectron2 --output detectron2.pkl

Torchvision's names serve timm and mmsegmentation too. CHECKPOINT: last.pth of a run, finished or
paused, a released one of the authors, or backbone.pth.

    resnet50().load_state_dict(torch.load("resnet50.pth"), strict=False)      misses only fc.weight
    and fc.bias

Slides: tables 2, 3, 4 and 7 (transfer). Paper: section 4.2.
Differs: the released code converts for detectron2 only, and does not look at what it wrote.
"""

from __future__ import annotations

import engine.interrupt  # noqa: F401  first: Ctrl-C while the others are loaded

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from backbone import RESNETS, build_backbone
from downstream import detectron2_names
from downstream.trunks import TrunkFile, read_trunk
from engine import checkpoint, files, options
from engine.options import check_writable
from engine.program import Stopped, path, run_program


def write(found: TrunkFile, form: str, output: Path) -> None:
    """The trunk under the names of the target. detectron2: a dictionary that its checkpointer
    matches by itself.

    A file *.pkl holds numpy arrays, as detectron2's own tools write them. Raises OSError.
    """
    if form == "torchvision":
        return checkpoint.save(output, found.state)
    contents = dict(
        model=detectron2_names.to_detectron2(found.state),
        __author__="SlotCon",
        matching_heuristics=True,
    )
    if output.suffix != ".pkl":
        return checkpoint.save(output, contents)
    contents["model"] = {name: value.numpy() for name, value in contents["model"].items()}
    files.write_atomically(output, lambda file: pickle.dump(contents, file))


def refuse_overwriting(source: Path, output: Path) -> None:
    """Raises ValueError where the output is the checkpoint that is read, by whatever name, or the
    last.pth of a run: the state of a training would be lost. Of a folder, last.pth is read.
    """
    if source.is_dir():
        source = source / "last.pth"
    if source.is_file() and output.is_file() and output.samefile(source):
        raise ValueError(
            f"--output {output} is the checkpoint itself, which would be overwritten: give another "
            "name"
        )
    if output.is_file() and output.name == "last.pth":
        raise ValueError(
            f"--output {output} is the last.pth of a run, which would be overwritten: give another "
            "name"
        )


def prove(found: TrunkFile, form: str, output: Path) -> str:
    """Load the file into the target's own key scheme; a random image must get the same features,
    bit for bit.

    Returns what was compared. Raises Stopped where they differ.
    """
    trunk = build_backbone(found.arch)
    checkpoint.load_strictly(trunk, found.state, output)
    target, note = (
        load_torchvision(found.arch, output)
        if form == "torchvision"
        else (load_detectron2(found.arch, output))
    )
    image = torch.rand(1, 3, 97, 129, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = trunk.eval()(image), target.eval()(image)
    difference = (ours - theirs).abs().max().item()
    if not torch.equal(ours, theirs):
        output.unlink()
        raise Stopped(
            f"{output} gave other features than the checkpoint, by {difference:g}, and was removed"
        )
    return f"{note}; features {tuple(ours.shape)} of a random image are identical"


def load_torchvision(arch: str, file: Path) -> tuple[nn.Module, str]:
    """torchvision's own network with the file in it, up to C5, and what was missing."""
    network = getattr(torchvision.models, arch)(weights=None)
    keys = network.load_state_dict(torch.load(file, weights_only=True), strict=False)
    if keys.missing_keys != ["fc.weight", "fc.bias"] or keys.unexpected_keys:
        raise Stopped(f"{file} does not fit torchvision's {arch}: {keys}")
    return Last(IntermediateLayerGetter(network, {"layer4": "out"})), (
        f"torchvision.models.{arch} misses exactly fc.weight and fc.bias"
    )


def load_detectron2(arch: str, file: Path) -> tuple[nn.Module, str]:
    """A network under detectron2's names with the file in it, strictly."""
    block, counts = RESNETS[arch]
    network = detectron2_names.ResNet(counts, bottleneck=block.expansion == 4)
    if file.suffix == ".pkl":
        arrays = pickle.loads(file.read_bytes())["model"]  # our own file, written a moment ago
        state = {name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}
    else:
        state = torch.load(file, weights_only=True)["model"]
    network.load_state_dict(state)
    return (
        network,
        f"all {len(state)} names of detectron2's {arch.replace('resnet', 'R-')} are there",
    )


class Last(nn.Module):
    """The map of a network that returns a dictionary."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> (b c h w)."""
        return self.network(images)["out"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError with one line."""
    parser = options.Parser(
        "export.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        type=path,
        help="last.pth of a run, the folder of the run, a released checkpoint, or backbone.pth",
    )
    add(
        "--format",
        choices=("torchvision", "detectron2"),
        default="torchvision",
        help="names of the tensors; torchvision's serve timm and mmsegmentation too (the default)",
    )
    add(
        "--output",
        type=path,
        required=True,
        help="file to write; *.pkl: numpy arrays, for detectron2 only",
    )
    add(
        "--network",
        choices=("teacher", "student"),
        default="teacher",
        help="which of the two (default: teacher)",
    )
    return parser.parse_args(argv)


def start(argv: list[str] | None) -> int:
    """Read, write, prove, and say what was done."""
    args = parse(argv)
    refuse_overwriting(args.checkpoint, args.output)
    found = read_trunk(args.checkpoint, args.network)
    if found.arch not in RESNETS:
        raise ValueError(
            f"{args.checkpoint} holds the trunk {found.arch}, which no other library has: only "
            f"{', '.join(RESNETS)} can be exported"
        )
    if args.format == "torchvision" and args.output.suffix == ".pkl":
        raise ValueError(f"--output {args.output}: *.pkl is for --format detectron2; take *.pth")
    check_writable(args.output, "--output")
    write(found, args.format, args.output)
    print(
        f"read     {args.checkpoint}: {found.arch}, {len(found.state)} tensors, {found.kind}\n"
        f"written  {args.output}\nproved   {prove(found, args.format, args.output)}"
    )
    if args.format == "detectron2":
        print(f"needs    {'; '.join(detectron2_names.SETTINGS)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return run_program("export.py", start, argv, alone=True)


if __name__ == "__main__":
    sys.exit(main())
