"""Which shortcuts the toy scenes leave open: what color, position or untrained texture say about the class.

Slide: none. Paper: none. Differs: ours [U].
"""

from __future__ import annotations

import numpy as np

from toy import CLASS_NAMES, Stream, scene


def audit(seed: int = 0, count: int = 128, preset: str = "scene", **dials) -> dict[str, float]:
    """How far each shortcut gets: balanced accuracy (chance 1/8) on pixels of unseen scenes, mIoU for k-means."""
    drawn = [scene(seed, index, preset, **dials) for index in range(2 * count)]
    images, labels = np.stack([s.image for s in drawn]), np.stack([s.semantic for s in drawn])
    red, green, blue = np.moveaxis(images, -1, 0).astype(np.int64) // 32
    rows, columns = np.indices(labels.shape[1:]) * 16 // labels.shape[1]
    return {
        "color": lookup_accuracy(64 * red + 8 * green + blue, labels),
        "position": lookup_accuracy(np.broadcast_to(16 * rows + columns, labels.shape), labels),
        "random_convolutions": random_convolution_accuracy(images, labels, seed),
        "rgb_kmeans_miou": kmeans_miou(images, labels, seed),
    }


def _balanced_accuracy(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([np.mean(guesses[labels == i] == i) for i in np.unique(labels)]))


def lookup_accuracy(cells: np.ndarray, labels: np.ndarray) -> float:
    """A table cell -> likeliest class (all classes alike), from half of the scenes. cells, labels (n y x) whole."""
    half = len(cells) // 2
    counts = np.zeros((cells.max() + 1, len(CLASS_NAMES)))
    np.add.at(counts, (cells[:half], labels[:half]), 1.0)
    likeliest = (counts / counts.sum(axis=0).clip(1.0)).argmax(axis=1)  # sum over cells, argmax over classes
    return _balanced_accuracy(likeliest[cells[half:]], labels[half:])


def random_convolution_accuracy(images: np.ndarray, labels: np.ndarray, seed: int = 0, width: int = 128) -> float:
    """Ridge regression on `width` rectified random 9x9 convolutions: what texture gives away without learning."""
    stream = Stream(seed)
    filters = stream.field(9 * 9 * 3, width) - 0.5
    y, x = (stream.field(2, 400) * (labels.shape[1] - 8)).astype(np.int64)  # 400 pixels of each scene
    patches = np.lib.stride_tricks.sliding_window_view(images / 255.0, (9, 9), axis=(1, 2))[:, y, x]
    features = abs(patches.reshape(*patches.shape[:2], -1) @ (filters - filters.mean(axis=0)))  # over taps
    features = np.concatenate([features, np.ones_like(features[..., :1])], axis=-1)
    labels, half = labels[:, y + 4, x + 4], len(images) // 2
    seen, wanted = features[:half].reshape(-1, width + 1), np.eye(len(CLASS_NAMES))[labels[:half].ravel()]
    weighted = seen / wanted.sum(axis=0).clip(1.0)[labels[:half].ravel()][:, None]  # classes count alike
    ridge = np.linalg.solve(weighted.T @ seen + 1e-4 * np.eye(width + 1), weighted.T @ wanted)
    return _balanced_accuracy((features[half:] @ ridge).argmax(axis=-1), labels[half:])


def kmeans_miou(images: np.ndarray, labels: np.ndarray, seed: int = 0, k: int = 8) -> float:
    """mIoU of k-means on colour, clusters matched with classes one to one. images (n y x 3), labels (n y x)."""
    from scipy.optimize import linear_sum_assignment

    picked = (Stream(seed, k).field(50_000) * labels.size).astype(np.int64)
    pixels, truth = images.reshape(-1, 3)[picked].astype(np.float64), labels.ravel()[picked]
    centers = pixels[:k]
    for _ in range(20):
        nearest = (centers @ pixels.T - 0.5 * (centers**2).sum(axis=1)[:, None]).argmax(axis=0)  # over centers
        groups = (pixels[nearest == i] for i in range(k))
        centers = np.stack([group.mean(axis=0) if len(group) else old for group, old in zip(groups, centers)])
    overlap = np.zeros((k, len(CLASS_NAMES)))
    np.add.at(overlap, (nearest, truth), 1.0)
    i, j = linear_sum_assignment(-overlap)
    union = overlap.sum(axis=1)[i] + overlap.sum(axis=0)[j] - overlap[i, j]
    return float(np.mean(overlap[i, j] / union))
