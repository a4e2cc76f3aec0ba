"""How many images one worker core prepares per second, beside the usual pipeline.

    python benchmarks/loader.py                        # photographs it draws itself, 640x480
    python benchmarks/loader.py --drawn 4000x3000      # larger ones
    python benchmarks/loader.py --images DIR           # yours

Ways of preparing the same two views of an image, taken in turn within one process:
    plain     the usual pipeline: Pillow and torchvision transforms, image by image
    ours      data.py: uint8 crops and boxes; the colors are left to the device
    finished  ours, and photometric.Photometric on the same core, for a machine without a GPU
A second is one of this process's own processor time, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms as T
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import photometric
from engine.batches import Samples
from engine.images import Photographs, find_images

NORMALIZE = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Plain:
    """The baseline: every operation on a Pillow image of its own, as torchvision documents it."""

    def __init__(self, root: Path, paths: list[str], size: int):
        self.root, self.paths, self.size = root, paths, size
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        self.colors = T.Compose([jitter, T.RandomGrayscale(p=0.2)])
        blur = T.GaussianBlur(23, (0.1, 2.0))
        self.last = [blur, T.Compose([T.RandomApply([blur], p=0.1), T.RandomSolarize(128, p=0.2)])]

    def __getitem__(self, index: int) -> tuple:
        image = Image.open(Path(self.root, self.paths[index])).convert("RGB")
        crop1 = data.draw_crop(image.height, image.width, random)
        crop2 = data.draw_crop(image.height, image.width, random, other=crop1)
        flipped = [random.random() < 0.5 for _ in range(2)]
        views = []
        for crop, flip, last in zip((crop1, crop2), flipped, self.last):
            size, bicubic = (self.size, self.size), TF.InterpolationMode.BICUBIC
            view = TF.resized_crop(image, *crop, size, bicubic)
            view = last(self.colors(TF.hflip(view) if flip else view))
            views.append(NORMALIZE(TF.to_tensor(view)))
        return views, data.overlap_boxes(crop1, crop2, flipped), torch.tensor(flipped)


class Ours:
    """What a reading process does in train.py; finished: the colors too."""

    def __init__(self, root: Path, paths: list[str], size: int, finished: bool = False):
        self.samples = Samples(Photographs(root, paths), data.TwoCrops(size), seed=0)
        self.colors = photometric.Photometric() if finished else None

    def batch(self, count: int) -> None:
        """Prepare `count` images."""
        batch = default_collate([self.samples[i][0] for i in range(count)])
        if self.colors:
            self.colors(batch.views, torch.Generator().manual_seed(0))


def plain_batch(plain: Plain, count: int) -> None:
    """Prepare `count` images."""
    default_collate([plain[i] for i in range(count)])


def draw_photographs(folder: str, count: int, width: int, height: int) -> None:
    """JPEG files with structure at all scales, as photographs have it, and some noise."""
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        image = torch.zeros(1, 3, height, width)
        for octave in range(1, max(width - 1, 1).bit_length() - 1):
            coarse = torch.randn(1, 3, 2**octave * 3 // 4 + 1, 2**octave + 1, generator=generator)
            image += F.interpolate(coarse, (height, width), mode="bicubic") / octave**1.5
        image += torch.randn(image.shape, generator=generator) * 0.06  # 3 gray levels
        pixels = (128 + 50 * image[0]).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(Path(folder, f"{number:03d}.jpg"), quality=90)


def measure(folder: str, args: argparse.Namespace) -> None:
    """Take turns, and print images per second and core."""
    root, paths, _ = find_images(folder)
    count = min(args.batch_size, len(paths))
    plain = Plain(root, paths, args.image_size)
    ours, finished = (Ours(root, paths, args.image_size, done) for done in (False, True))
    ways = dict(
        plain=lambda: plain_batch(plain, count),
        ours=lambda: ours.batch(count),
        finished=lambda: finished.batch(count),
    )
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(args.rounds + 1):  # the first warms up
        for name, prepare in ways.items():
            began = time.process_time()
            prepare()
            if round_number:
                rates[name].append(count / (time.process_time() - began))
    print(f"{count} photographs, {args.image_size} px, torch {torch.__version__}")
    for name, values in rates.items():
        times = statistics.median(v / first for v, first in zip(values, rates["plain"]))
        print(
            f"{name:10}{statistics.median(values):8.1f} images/s per core  ({min(values):.1f} .. "
            f"{max(values):.1f})  {times:.2f} times plain"
        )
    print(json.dumps(rates))


def main() -> None:
    """Read the options, draw photographs where none are given, and measure."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", help="folder of photographs (default: drawn)")
    parser.add_argument("--drawn", default="640x480", help="width x height of those it draws, px")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(1)  # everything is per core
    with tempfile.TemporaryDirectory() as folder:
        if not args.images:
            width, height = map(int, args.drawn.split("x"))
            draw_photographs(folder, args.batch_size, width, height)
        measure(args.images or folder, args)


if __name__ == "__main__":
    main()
