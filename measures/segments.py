"""What a trained network makes of pictures, one after the other: their segments, and the best ones per prototype.

Slide: "Understanding the semantic grouping ability: nearest neighbor visualization" (figure 3). Paper: section 4.
Differs: the released code also ranks pictures in which a prototype owns no pixel; here a prototype retrieves only
pictures in which it is occupied. Only scores are kept, never the features of a data set.
Read next: evaluate.py, visualize.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import toy
from data import center_square
from engine.images import BadImage, ImageFiles, find_images
from grouping import GroupingNetwork
from measures.labels import ToyScenes
from photometric import normalize
from slots import occupied

# ------------------------------------------------------------------------- segments of pictures


def winner(maps: Tensor, size: tuple[int, int], chunk: int = 64) -> Tensor:
    """Which of k maps is the largest at each pixel of the picture: with similarities, the nearest prototype.

    maps (b k h w) -> (b y x) int64 in 0..k-1, the lower index at a tie. Maps, not decisions, are enlarged (bilinear,
    pixel centres aligned) [P], and `chunk` of them at a time: 2,048 maps of 320 px take 0.8 GB per picture.
    """
    best = maps.new_full((len(maps), *size), -torch.inf)
    largest = torch.zeros_like(best, dtype=torch.long)
    for first in range(0, maps.shape[1], chunk):
        enlarged = F.interpolate(maps[:, first : first + chunk], size, mode="bilinear", align_corners=False)
        score, index = enlarged.max(dim=1)  # over k
        largest = torch.where(score > best, index + first, largest)
        best = torch.maximum(score, best)
    return largest


@torch.no_grad()
def segment(network: GroupingNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """images (b 3 y x) uint8, anywhere -> segments (b y x) int64 and occupied (b k) bool, on the CPU.

    A prototype is occupied where the network itself sees it: on the feature grid, before enlarging, as in training.
    """
    device = network.prototypes.weight.device
    _, similarity = network(normalize(images.to(device)))
    return winner(similarity, images.shape[-2:]).cpu(), occupied(similarity).cpu()


# --------------------------------------------------------------------------- pictures in order


class Problem(NamedTuple):
    """Why a picture is missing. An exception would come out of a worker process as a long traceback."""

    line: str
    fatal: bool


class Views:
    """view(pictures[index]) with its index, or the problem in its place."""

    def __init__(self, pictures: Sequence, view: Callable[[Any], Any]):
        self.pictures, self.view = pictures, view

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.view(self.pictures[index])
        except BadImage as bad:
            return index, Problem(f"left out {bad.name}: {bad.reason}", fatal=False)
        except ValueError as error:
            return index, Problem(str(error), fatal=True)


def stream(
    pictures: Sequence, view: Callable[[Any], Any], batch_size: int, workers: int = 0, title: str = ""
) -> Iterator[tuple[Tensor, Any]]:
    """Batches of view(pictures[i]) in the order of the pictures: indices (b) int64, and the views collated.

    Memory does not depend on the number of pictures. A progress bar shows where stderr is a terminal. A picture that
    cannot be read is left out and named there; any other problem ends the stream with ValueError.
    """
    loader = DataLoader(Views(pictures, view), batch_size, num_workers=workers, collate_fn=list)
    with tqdm(total=len(pictures), desc=title, unit="picture", disable=None, leave=False) as bar:
        for items in loader:
            good = []
            for index, item in items:
                if not isinstance(item, Problem):
                    good.append((index, item))
                elif item.fatal:
                    raise ValueError(item.line)
                else:
                    tqdm.write(item.line, file=sys.stderr)
            bar.update(len(items))
            if good:
                yield default_collate(good)


def open_pictures(dataset: str, data_dir: str | Path | None, limit: int = 0, **toy_scenes) -> Sequence[Tensor]:
    """Pictures without labels: those of a folder, COCO's val2017 if it has that, or toy scenes never trained on.

    limit: the first so many, 0: all. Raises ValueError with one line where there are none.
    """
    if dataset == "toy":
        return ToyScenes(count=limit or 256, **toy_scenes)
    if not data_dir:
        raise ValueError("--data-dir is missing: the folder of pictures to look at")
    folder = Path(data_dir)
    root, paths, _ = find_images(folder / "val2017" if (folder / "val2017").is_dir() else folder)
    return ImageFiles(root, paths[: limit or None])


def picture_size(dataset: str, config: dict) -> int:
    """The side at which a network is shown pictures, px: toy scenes as they are drawn, photographs as in training."""
    return toy.Dials().size if dataset == "toy" else config.get("image_size", 224)


def centre_view(size: int) -> Callable[[Tensor], Tensor]:
    """image (3 y x) -> its centre (3 size size), short side at 8/7 of size: 256 for 224. A square of `size` stays."""
    return partial(_centre_view, size=size)


def _centre_view(image: Tensor, size: int) -> Tensor:
    return image if image.shape[-2:] == (size, size) else center_square(image, size)


# ----------------------------------------------------------------------------------- retrieval


def segment_scores(similarity: Tensor) -> Tensor:
    """How purely each prototype's segment is that prototype: the mean of its similarity over the pixels it owns.

    similarity (b k h w) -> (b k) in [-1, 1]; -inf where a prototype owns no pixel, so that it retrieves nothing there.
    """
    score, owner = similarity.max(dim=1)  # over k
    score, owner = rearrange(score, "b h w -> b (h w)"), rearrange(owner, "b h w -> b (h w)")
    empty = similarity.new_zeros(similarity.shape[:2])
    total = empty.scatter_add(1, owner, score)
    pixels = empty.scatter_add(1, owner, torch.ones_like(score))
    return torch.where(pixels > 0, total / pixels, -torch.inf)


class Retrieval:
    """The `top` pictures with the best segment of each prototype, and in how many pictures it occurs at all.

    scores (k top), best first, -inf where fewer pictures were found; pictures (k top) int64, -1 there; active (k)
    int64. Its size depends on k and top alone. At a tie the earlier picture wins.
    """

    def __init__(self, num_prototypes: int, top: int = 5):
        self.scores = torch.full((num_prototypes, top), -torch.inf)
        self.pictures = torch.full((num_prototypes, top), -1)
        self.active = torch.zeros(num_prototypes, dtype=torch.long)

    def add(self, indices: Tensor, similarity: Tensor) -> None:
        """indices (b) int64 of the pictures, ascending over all calls; similarity (b k h w)."""
        found = rearrange(segment_scores(similarity), "b k -> k b").float().cpu()
        self.active += found.isfinite().sum(dim=1)  # over b
        # Stable, and with the older ones in front, so that at a tie the earlier picture stays, and at -inf the -1.
        scores, order = torch.cat([self.scores, found], dim=1).sort(dim=1, descending=True, stable=True)
        candidates = torch.cat([self.pictures, indices.expand_as(found)], dim=1)
        top = self.scores.shape[1]
        self.scores, self.pictures = scores[:, :top], candidates.gather(1, order)[:, :top]
