"""Images one batch after another: opened, cut to squares, and read in order by worker processes.

Slide: none.
Paper: none.
Differs: ours [U].

Memory does not depend on the number of images. An image that cannot be read is left out and named;
it does not end the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

import toy
from data import center_square
from engine.images import BadImage, ImageFiles, find_images
from measures.labels import Labeled, ToyScenes, square

# --------------------------------------------------------------------------------------- reading


class Problem(NamedTuple):
    """Why an image is missing. An exception in a worker process would print a long traceback."""

    line: str
    fatal: bool


class Views(Dataset):
    """Item i: (i, view(images[i])), or (i, Problem)."""

    def __init__(self, images: Sequence, view: Callable[[Any], Any]):
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.view(self.images[index])
        except BadImage as bad:
            return index, Problem(f"left out {bad.name}: {bad.reason}", fatal=False)
        except ValueError as error:
            return index, Problem(str(error), fatal=True)


def stream(
    images: Sequence, view: Callable[[Any], Any], batch_size: int, workers: int = 0, title: str = ""
) -> Iterator[tuple[Tensor, Any]]:
    """Batches of view(images[i]) in the order of the images.

    workers: processes that read, 0: none; title: of the progress bar, which is shown where stderr
    is a terminal. Yields indices (b) int64 and the views collated. An image that cannot be read is
    left out and named on stderr; any other problem ends the stream with ValueError.
    """
    loader = DataLoader(Views(images, view), batch_size, num_workers=workers, collate_fn=list)
    with tqdm(total=len(images), desc=title, unit="image", disable=None, leave=False) as bar:
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


def labeled_batches(
    labeled: Labeled, size: int, batch_size: int, workers: int = 0, title: str = ""
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
    """`stream` of (image (b 3 size size) uint8, label (b size size)), the protocol's squares."""
    return stream(labeled, partial(square, size=size), batch_size, workers, title)


# --------------------------------------------------------------------------------------- opening


def spaced(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices, evenly spaced, 0: all. Neighbors in the order of names are often
    of one kind.
    """
    limit = min(limit, count) or count
    return [i * count // limit for i in range(limit)]


def open_images(
    dataset: str, data_dir: str | Path | None, limit: int = 0
) -> ImageFiles | ToyScenes:
    """Images without labels: of a folder (of its val2017 if it has that), or unseen toy scenes.

    dataset: folder or toy; limit: so many, evenly spaced, 0: all, which for toy scenes is 256.
    Raises ValueError with one line where there are none.
    """
    if dataset == "toy":
        return ToyScenes(count=limit or 256)
    if not data_dir:
        raise ValueError("--data-dir is missing: the folder of images to show the network")
    folder = Path(data_dir)
    folder = folder / "val2017" if (folder / "val2017").is_dir() else folder
    root, paths, _ = find_images(folder)
    return ImageFiles(root, paths[spaced(len(paths), limit)])


def open_files(files: Sequence[Path]) -> ImageFiles:
    """These image files."""
    return ImageFiles(".", np.array([str(file.absolute()) for file in files]))


def read_views(images: Sequence[Tensor], view: Callable[[Tensor], Tensor]) -> Tensor:
    """All images as views (b 3 y x) uint8 in memory. Raises ValueError with one line."""
    try:
        return torch.stack([view(images[index]) for index in range(len(images))])
    except BadImage as bad:
        raise ValueError(f"cannot read {bad.name}: {bad.reason}") from None


# ------------------------------------------------------------------------------------------ views


def default_size(dataset: str, config: Mapping[str, Any]) -> int:
    """The side of the views, px: toy scenes as they are drawn, photographs as in training.

    config: of the checkpoint, whose image_size is used.
    """
    return toy.Dials().size if dataset == "toy" else config.get("image_size", 224)


def center_view(size: int) -> Callable[[Tensor], Tensor]:
    """A function: image (3 y x) -> its center (3 size size), the short side at 8/7 of size before.

    That is 256 for 224. A square of `size` stays as it is.
    """
    return partial(_center_view, size=size)


def _center_view(image: Tensor, size: int) -> Tensor:
    return image if image.shape[-2:] == (size, size) else center_square(image, size)
