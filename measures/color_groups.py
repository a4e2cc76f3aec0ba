"""Groups by color alone, k-means on RGB: the baseline that anything learned must beat.

Slide: none.
Paper: none.
Differs: ours [U].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import numpy as np
import torch
from einops import rearrange
from scipy.cluster.vq import kmeans2
from scipy.spatial import KDTree
from torch import Tensor

from measures.labels import Labeled
from measures.streams import labeled_batches

Segmenter = Callable[[Tensor], tuple[Tensor, Tensor]]  # images (b 3 y x) -> (b y x), (b k) bool


def rgb_kmeans(pixels: Tensor, num_groups: int, seed: int = 0) -> Segmenter:
    """Fit k-means to pixels (n 3) uint8; the result maps images to the nearest of k colors.

    It takes images (b 3 y x) uint8 and returns segments (b y x) and which groups occur (b k) bool.
    """
    colors = pixels.double().numpy()
    distinct = len(np.unique(colors, axis=0))  # no more centers than colors
    # scipy's k-means++ takes k * k * n steps, which is minutes from k = 256 on.
    start = "++" if num_groups <= 64 else "points"
    with warnings.catch_warnings():
        # An empty cluster keeps its center and gets no pixel, which does no harm.
        warnings.filterwarnings("ignore", "One of the clusters is empty")
        centers, _ = kmeans2(colors, min(num_groups, distinct), minit=start,
                             rng=np.random.default_rng(seed), iter=20)
    tree = KDTree(centers)

    def segmenter(images: Tensor) -> tuple[Tensor, Tensor]:
        b, _, y, x = images.shape
        nearest = tree.query(rearrange(images, "b rgb y x -> (b y x) rgb").cpu().numpy())[1]
        segments = rearrange(torch.from_numpy(nearest), "(b y x) -> b y x", b=b, y=y, x=x)
        present = torch.zeros(b, num_groups, dtype=torch.bool)
        return segments, present.scatter(1, rearrange(segments, "b y x -> b (y x)"), True)

    return segmenter


def sample_pixels(batches: Iterable[Tensor], per_image: int = 256, seed: int = 0) -> Tensor:
    """batches of images (b 3 y x) -> colors (n 3) of `per_image` random pixels of each."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for images in batches:
        for pixels in rearrange(images, "b rgb y x -> b (y x) rgb"):
            samples.append(pixels[torch.randint(len(pixels), (per_image,), generator=generator)])
    return torch.cat(samples)


def fit_to(
    labeled: Labeled, size: int, num_groups: int, batch_size: int, workers: int
) -> Segmenter:
    """`rgb_kmeans` on the pixels of up to 256 images, evenly spread over the data set."""
    spread = torch.linspace(0, len(labeled) - 1, min(256, len(labeled))).long().tolist()
    batches = labeled_batches(labeled.subset(spread), size, batch_size, workers, "k-means")
    return rgb_kmeans(sample_pixels(images for _, (images, _) in batches), num_groups)
