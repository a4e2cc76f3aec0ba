"""One color per prototype, the same in every figure, and distinct for every kind of color vision.

Slide: none.
Paper: none.
Differs: ours [U].
"""

from __future__ import annotations

import functools

import numpy as np

# Okabe and Ito (2008): orange, sky blue, bluish green, yellow, blue, vermilion, reddish purple.
FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
         (204, 121, 167))  # fmt: skip
GRAY = (160, 160, 160)  # what has no prototype

# How linear RGB looks without the long-, medium- or short-wave cones (Machado, Oliveira, Fernandes
# 2009, severity 1).
VISIONS = {
    "usual": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip

# Linear RGB -> cone responses -> Oklab, in which equal distances look about equally different
# (Ottosson 2020).
TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
TO_OKLAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def appearance(colors: np.ndarray) -> np.ndarray:
    """colors (n 3) 0..255 sRGB -> (n vision 3) Oklab, one row for each of `VISIONS`."""
    share = np.asarray(colors) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.stack([linear @ vision.T for vision in VISIONS.values()], axis=1).clip(0, 1)
    return np.cbrt(seen @ TO_CONES.T) @ TO_OKLAB.T


@functools.lru_cache(maxsize=8)
def prototype_colors(num_prototypes: int) -> np.ndarray:
    """The colors of prototypes 0..k-1: (k 3) uint8, read-only. That of a prototype suits any k.

    The first seven are Okabe and Ito's. Each next color is the candidate that is farthest from its
    nearest color so far, where the distance is that of the vision that separates the two worst.
    Most readers have usual vision, which must separate them better than the others: its squared
    distances count for a third.
    """
    level = np.linspace(0, 255, 17).round()
    candidates = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = appearance(candidates)
    middle = (seen[:, 0, 0] > 0.25) & (seen[:, 0, 0] < 0.95)  # lightness: clear of black and white
    candidates, seen = candidates[middle], seen[middle]
    chosen, nearest = list(FIRST[:num_prototypes]), np.full(len(candidates), np.inf)
    weight = np.array([1 / 3 if vision == "usual" else 1 for vision in VISIONS])

    def distance(color: np.ndarray | tuple[int, ...]) -> np.ndarray:
        by_vision = np.square(seen - appearance(np.array([color]))).sum(axis=2)  # over Oklab
        return (by_vision * weight).min(axis=1)  # over visions

    for color in chosen:
        nearest = np.minimum(nearest, distance(color))
    while len(chosen) < num_prototypes:
        chosen.append(tuple(candidates[nearest.argmax()]))
        nearest = np.minimum(nearest, distance(chosen[-1]))
    colors = np.array(chosen, dtype=np.uint8)
    colors.flags.writeable = False
    return colors
