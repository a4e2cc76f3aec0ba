"""How far do shortcuts get on toy scenes? Classes guessed from color, place or texture, no network.

python benchmarks/shortcuts.py              256 scenes, seed 0: a minute on one core
python benchmarks/shortcuts.py --hue-bias 1      classes that have a color each
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measures import metrics
from measures.groups import rgb_kmeans
from toy import CLASS_NAMES, Dials, Stream, scene


def shortcuts(seed: int = 0, count: int = 128, **dials: Any) -> dict[str, float]:
    """Balanced accuracy of every shortcut and the mIoU of k-means; count: scenes to learn from."""
    drawn = [scene(seed, index, **dials) for index in range(2 * count)]
    images, labels = np.stack([s.image for s in drawn]), np.stack([s.semantic for s in drawn])
    red, green, blue = np.moveaxis(images, -1, 0).astype(np.int64) // 32
    rows, columns = np.indices(labels.shape[1:]) * 16 // labels.shape[1]
    return {
        "color": lookup_accuracy(64 * red + 8 * green + blue, labels),
        "position": lookup_accuracy(np.broadcast_to(16 * rows + columns, labels.shape), labels),
        "random_convolutions": random_convolution_accuracy(images, labels, seed),
        "rgb_kmeans_miou": kmeans_miou(images, labels, seed),
    }


def balanced_accuracy(guesses: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of the share of their pixels that is guessed."""
    return float(np.mean([np.mean(guesses[labels == t] == t) for t in np.unique(labels)]))


def lookup_accuracy(cells: np.ndarray, labels: np.ndarray) -> float:
    """Balanced accuracy of the likeliest class of each cell: (b y x) int, both; half to learn."""
    half = len(cells) // 2
    counts = np.zeros((cells.max() + 1, len(CLASS_NAMES)))
    np.add.at(counts, (cells[:half], labels[:half]), 1.0)
    likeliest = (counts / counts.sum(axis=0).clip(1.0)).argmax(axis=1)  # over cells; over t
    return balanced_accuracy(likeliest[cells[half:]], labels[half:])


def random_convolution_accuracy(images: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Balanced accuracy of ridge regression on rectified random 9x9 convolutions."""
    stream, width = Stream(seed), 128
    filters = stream.field(9 * 9 * 3, width) - 0.5
    y, x = (stream.field(2, 400) * (labels.shape[1] - 8)).astype(np.int64)  # 400 pixels of each
    patches = np.lib.stride_tricks.sliding_window_view(images / 255.0, (9, 9), axis=(1, 2))[:, y, x]
    patches = patches.reshape(*patches.shape[:2], -1)
    features = abs(patches @ (filters - filters.mean(axis=0)))  # mean over taps
    features = np.concatenate([features, np.ones_like(features[..., :1])], axis=-1)
    labels, half = labels[:, y + 4, x + 4], len(images) // 2
    learned_from = features[:half].reshape(-1, width + 1)
    wanted = np.eye(len(CLASS_NAMES))[labels[:half].ravel()]
    count = wanted.sum(axis=0).clip(1.0)[labels[:half].ravel()]  # over pixels
    weighted = learned_from / count[:, None]  # every class counts alike
    square = weighted.T @ learned_from + 1e-4 * np.eye(width + 1)
    ridge = np.linalg.solve(square, weighted.T @ wanted)
    return balanced_accuracy((features[half:] @ ridge).argmax(axis=-1), labels[half:])


def kmeans_miou(images: np.ndarray, labels: np.ndarray, seed: int = 0, k: int = 8) -> float:
    """One-to-one mIoU of k-means on 50,000 pixels; images (b y x 3) uint8, labels (b y x)."""
    picked = (Stream(seed, k).field(50_000) * labels.size).astype(np.int64)
    pixels = torch.from_numpy(images.reshape(-1, 3)[picked])
    groups, _ = rgb_kmeans(pixels, k, seed)(rearrange(pixels, "n rgb -> 1 rgb 1 n"))
    target = torch.from_numpy(labels.ravel()[picked])
    confusion = metrics.confusion_matrix(groups.flatten(), target, k, len(CLASS_NAMES))
    return metrics.miou(confusion, metrics.match(confusion))


def main() -> None:
    """One line per shortcut."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=int, default=256, help="scenes to learn from (256)")
    parser.add_argument("--seed", type=int, default=0)
    text = "how often the class decides the hue, 0 to 1 (default: as train.py draws scenes)"
    parser.add_argument("--hue-bias", type=float, default=Dials().hue_bias, help=text)
    args = parser.parse_args()
    for name, score in shortcuts(args.seed, args.count, hue_bias=args.hue_bias).items():
        print(f"{name:<20}{score:.2f}")


if __name__ == "__main__":
    main()
