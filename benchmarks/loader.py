"""How many images one worker core prepares per second, and where the time goes.

    python benchmarks/loader.py                        # photographs it draws itself, 640x480
    python benchmarks/loader.py --drawn 4000x3000      # larger ones
    python benchmarks/loader.py --images DIR           # yours
    python benchmarks/loader.py --device cuda          # the photometric part on the GPU

Four ways of preparing the same two views of an image, taken in turn so that a busy machine is busy
for all:
    plain     the usual pipeline: Pillow and torchvision transforms, image by image
    ours      data.py: uint8 crops and boxes; the photometric part is left to the device
    whole     ours, but every file is decoded in full, whatever the crops need
    finished  ours, and photometric.Photometric in the same worker, for a machine without a GPU
A second is one of the worker's own processor time, so that other programs on the machine do not
count; the rate by the clock on the wall stands beside it and is the same where nothing else runs.
"""

import argparse
import functools
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms as T
from torchvision.transforms import functional as TF

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))
import data
import photometric
from engine import loader
from engine.images import ImageFiles, Photographs, find_images

PLAIN, OURS, WHOLE, FINISHED = "plain", "ours", "whole", "finished"


class PlainTwoCrops(Dataset):
    """The baseline: every operation on its own Pillow image, the way torchvision's documentation
    shows it.
    """

    def __init__(self, root, paths, size):
        self.root, self.paths, self.size = root, paths, size
        self.jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        self.gray = T.RandomGrayscale(p=0.2)
        self.finish = T.Compose(
            [T.ToTensor(), T.Normalize(photometric.IMAGENET_MEAN, photometric.IMAGENET_STD)]
        )
        self.seconds = dict.fromkeys(
            (
                "read",
                "decode",
                "boxes",
                "crops",
                "jitter and gray",
                "blur and solarize",
                "float and normalize",
                "collate",
            ),
            0.0,
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, sample):
        clock = Clock(self.seconds)
        content = Path(self.root, str(self.paths[sample % len(self)])).read_bytes()
        clock("read")
        image = Image.open(io.BytesIO(content)).convert("RGB")
        clock("decode")
        crop1 = data.draw_crop(image.height, image.width, random)
        crop2 = data.draw_crop(image.height, image.width, random, other=crop1)
        flipped = [random.random() < 0.5 for _ in range(2)]
        boxes = data.overlap_boxes(crop1, crop2, flipped)
        clock("boxes")
        pair = [
            TF.resized_crop(image, *crop, (self.size, self.size), TF.InterpolationMode.BICUBIC)
            for crop in (crop1, crop2)
        ]
        pair = [TF.hflip(view) if flip else view for view, flip in zip(pair, flipped)]
        clock("crops")
        pair = [self.gray(self.jitter(view)) for view in pair]
        clock("jitter and gray")
        for number, (p_blur, p_solarize) in enumerate([(1.0, 0.0), (0.1, 0.2)]):
            if random.random() < p_blur:
                pair[number] = pair[number].filter(
                    ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))
                )
            if random.random() < p_solarize:
                pair[number] = ImageOps.solarize(pair[number], 128)
        clock("blur and solarize")
        pair = [self.finish(view) for view in pair]
        clock("float and normalize")
        return pair, boxes, torch.tensor(flipped)


class Clock:
    """Adds the processor time since its last call to a stage."""

    def __init__(self, seconds):
        self.seconds, self.last = seconds, time.process_time()

    def __call__(self, stage):
        now = time.process_time()
        self.seconds[stage] += now - self.last
        self.last = now


def finished(items):
    batch, failures = loader.collate(items)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return batch._replace(views=photometric.Photometric()(batch.views, generator)), failures


def stamped(collate, items):
    return collate(items), time.process_time(), time.perf_counter()


def worker_rates(variant, root, paths, args):
    """images/s out of one worker process, by its processor time and by the wall; the first batch is
    left out.
    """
    if variant == PLAIN:
        dataset, collate = PlainTwoCrops(root, paths, args.image_size), default_collate
    else:
        images = (ImageFiles if variant == WHOLE else Photographs)(root, paths)
        dataset = loader.Samples(images, data.TwoCrops(args.image_size), seed=0)
        collate = finished if variant == FINISHED else loader.collate
    sampler = loader.RunSampler(len(paths), args.batch_size, stop=args.batches + 1)
    batches = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=1,
        collate_fn=functools.partial(stamped, collate),
    )
    stamps = [stamp for _, *stamp in batches]
    return tuple(
        args.batches * args.batch_size / (last - first)
        for first, last in zip(stamps[0], stamps[-1])
    )


def our_stages(root, paths, args):
    """ms per image of each stage in this process. Reading and decoding are one call in data.py:
    read alone is timed on a file that the system then has in memory, and taken off.
    """
    seconds = dict.fromkeys(("read", "decode", "boxes", "crops", "collate"), 0.0)
    images, rng, items = Photographs(root, paths), random.Random(0), []
    for index in range(args.batch_size):
        clock = Clock(seconds)
        Path(root, str(paths[index])).read_bytes()
        clock("read")
        image = images[index]
        clock("decode")
        height, width = image.shape[1:]
        crop1 = data.draw_crop(height, width, rng)
        crop2 = data.draw_crop(height, width, rng, other=crop1)
        flipped = [rng.random() < 0.5 for _ in range(2)]
        boxes = data.overlap_boxes(crop1, crop2, flipped)
        clock("boxes")
        pixels = image.pixels(min(*crop1[2:], *crop2[2:]) / args.image_size)
        clock("decode")
        pair = torch.stack(
            [
                data.resized_crop(pixels, crop, args.image_size, flip)
                for crop, flip in zip((crop1, crop2), flipped)
            ]
        )
        clock("crops")
        items.append((data.Batch(pair, boxes, torch.tensor(flipped)), []))
    clock = Clock(seconds)
    batch, _ = loader.collate(items)
    clock("collate")
    seconds["decode"] -= seconds["read"]
    return {stage: 1e3 * value / args.batch_size for stage, value in seconds.items()}, batch


def plain_stages(root, paths, args):
    dataset = PlainTwoCrops(root, paths, args.image_size)
    items = [dataset[index] for index in range(args.batch_size)]
    clock = Clock(dataset.seconds)
    default_collate(items)
    clock("collate")
    return {stage: 1e3 * value / args.batch_size for stage, value in dataset.seconds.items()}


def photometric_ms(batch, device):
    """ms per image of photometric.Photometric for a batch that is on the device already."""
    on_device, generator = batch.views.to(device), torch.Generator(device).manual_seed(0)
    change, clock, wait = photometric.Photometric(), time.process_time, lambda: None
    if device.type == "cuda":
        clock, wait = time.perf_counter, torch.cuda.synchronize
    change(on_device[:2], generator)  # the first call prepares the blur's table
    wait()
    start = clock()
    change(on_device, generator)
    wait()
    return 1e3 * (clock() - start) / len(on_device)


def draw_photographs(folder, count, width=640, height=480, noise=0.0):
    """JPEG files with structure at all scales, as photographs have it; about 100 KB each at
    640x480. noise: of every pixel, gray levels.
    """
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        image = torch.zeros(1, 3, height, width)
        for octave in range(1, max(width - 1, 1).bit_length() - 1):
            coarse = torch.randn(1, 3, 2**octave * 3 // 4 + 1, 2**octave + 1, generator=generator)
            size = (height, width)
            image += F.interpolate(coarse, size, mode="bicubic", align_corners=False) / octave**1.5
        if noise:  # as of a camera's sensor: it fills most of a large file
            image += torch.randn(image.shape, generator=generator) * noise / 50
        pixels = (128 + 50 * image[0]).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(Path(folder, f"{number:03d}.jpg"), quality=90)


def spread(values):
    return f"{statistics.median(values):9.2f}  ({min(values):.2f} .. {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder of photographs (default: drawn for the occasion)")
    parser.add_argument("--drawn", default="640x480", help="width x height of those it draws, px")
    parser.add_argument(
        "--noise", type=float, default=3, help="gray levels, of those not drawn at 640x480"
    )
    parser.add_argument("--count", type=int, default=64, help="how many it draws")
    parser.add_argument(
        "--variants", nargs="+", default=[PLAIN, OURS, WHOLE, FINISHED], help="in this order"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--batches", type=int, default=4, help="timed batches of each variant per round"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--device", default="cpu", help="where the photometric part is timed: cpu or cuda"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # everything is per core
    with tempfile.TemporaryDirectory() as folder:
        if args.images is None:
            drawn = [int(side) for side in args.drawn.split("x")]
            draw_photographs(folder, args.count, *drawn, args.noise if drawn != [640, 480] else 0)
        measure(args, *find_images(args.images or folder)[:2])


def measure(args, root, paths):
    device, source = torch.device(args.device), args.images or f"drawn, {args.drawn}"
    count = len(paths)
    paths = np.tile(paths, -(-args.batch_size * (args.batches + 1) // count))
    rates, stages = (
        {variant: [] for variant in args.variants},
        {PLAIN: [], OURS: [], "photometric": []},
    )
    for _ in range(args.rounds):
        for variant, measured in rates.items():
            measured.append(worker_rates(variant, root, paths, args))
        if PLAIN in rates:
            stages[PLAIN].append(plain_stages(root, paths, args))
        ours, batch = our_stages(root, paths, args)
        stages[OURS].append(ours)
        stages["photometric"].append(photometric_ms(batch, device))

    processor = f"{os.cpu_count()}-core {platform.processor() or platform.machine()} CPU"
    print(
        f"{count} photographs ({source}), batch {args.batch_size}, {args.image_size} px, one "
        f"worker, {processor}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; median (smallest .. largest) of "
        f"{args.rounds} "
        "rounds\n"
    )
    print(
        f"variant   images/s per core             {'times ' + args.variants[0]:30}"
        "images/s on the wall"
    )
    report = dict(
        source=str(source),
        photographs=count,
        batch_size=args.batch_size,
        image_size=args.image_size,
        rounds=args.rounds,
        images_per_second={},
        times_first={},
        images_per_second_wall={},
        stages_ms={},
    )
    for variant, measured in rates.items():
        columns = dict(
            images_per_second=[core for core, _ in measured],
            times_first=[
                core / first for (core, _), (first, _) in zip(measured, rates[args.variants[0]])
            ],
            images_per_second_wall=[wall for _, wall in measured],
        )
        print(f"{variant:9} " + "".join(f"{spread(values):30}" for values in columns.values()))
        for column, values in columns.items():
            report[column][variant] = statistics.median(values)
    for variant in (PLAIN, OURS):
        if not stages[variant]:
            continue
        print(f"\n{variant}: stage, ms per image")
        medians = {}
        for stage in stages[variant][0]:
            measured = [one[stage] for one in stages[variant]]
            medians[stage] = statistics.median(measured)
            print(f"  {stage:20} {spread(measured)}")
        report["stages_ms"][variant] = medians
    print(f"\nphotometric part on {device}, ms per image {spread(stages['photometric'])}")
    report.update(
        photometric_ms=statistics.median(stages["photometric"]),
        device=str(device),
        cpu=processor,
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
