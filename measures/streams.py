"""Images in order, one batch after another: opened, cut to squares, read by worker processes."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

import toy
from data import center_square, middle
from engine.batches import load
from engine.images import BadImage, Photograph, Photographs, find_images, look_like_labels
from engine.log import progress, say
from measures.datasets import UNSEEN, Labeled

SIZE = 224  # px, of photographs that are shown to a network [U]
Batches = Iterable[tuple[Tensor, tuple[Tensor, Tensor]]]  # labeled: indices, (images, label)


def read(images: Sequence, view: Callable, indices: Sequence[int]) -> list[tuple[int, Any]]:
    """Pairs of i and view(images[i]); an image that cannot be read is a line and no pair."""
    items = []
    for i in indices:
        try:
            items.append((i, view(images[i])))
        except BadImage as bad:
            say(f"left out {bad}")
    return items


def stream(
    images: Sequence, view: Callable, batch_size: int, workers: int = 0, title: str = "images"
) -> Iterator[tuple[Tensor, Any]]:
    """Batches of indices (b) and views; an unreadable image is left out. Raises ValueError."""
    places = BatchSampler(range(len(images)), batch_size, drop_last=False)
    batches = load(partial(read, images, view), places, workers)
    seen = progress(batches, len(places), title + ", batches" * (batch_size > 1))
    yield from (default_collate(items) for items in seen if items)


def labeled_batches(labeled: Labeled, size: int, *given: Any, **named: Any) -> Batches:
    """`stream` of images (b 3 size size) uint8 with labels (b size size), both `square`."""
    return stream(labeled, partial(square, size=size), *given, **named)


def square(pair: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Image (3 y x) and label (y x): the short side to `size`, then the center [P]."""
    image = resize(middle(pair[0]), [size], InterpolationMode.BILINEAR, antialias=True)
    # PIL's nearest, which the protocol used, is torchvision's "exact": the pixel under the center.
    label = resize(middle(pair[1])[None], [size], InterpolationMode.NEAREST_EXACT)
    return center_crop(image, [size]), center_crop(label, [size])[0]


def spaced(count: int, limit: int) -> list[int]:
    """`limit` of `count` indices, evenly spaced; 0: all."""
    limit = min(limit, count) or count
    return [i * count // limit for i in range(limit)]


def open_images(dataset: str, data_dir: Path | None, limit: int = 0) -> Photographs | toy.ToyImages:
    """Images of a folder or its val2017, or unseen toy scenes; limit 0: all. Raises ValueError."""
    if dataset == "toy":
        return toy.ToyImages(UNSEEN, limit or 256)
    if not data_dir:
        raise ValueError("--data-dir is missing: the folder of images to show the network")
    folder = data_dir / "val2017" if (data_dir / "val2017").is_dir() else data_dir
    photos = open_photographs([folder])
    return Photographs(photos.root, photos.paths[spaced(len(photos), limit)])


def open_photographs(places: Sequence[Path]) -> Photographs:
    """The photographs in files and folders, named from where all lie. Raises ValueError."""
    single = (place for place in places if place.is_file() and place.suffix != ".txt")  # no list
    files = set(map(os.path.abspath, single))
    for folder in (place for place in places if os.path.abspath(place) not in files):
        root, paths, notice = find_images(folder)
        print(f"{len(paths)} images: {notice}{look_like_labels(paths)}")
        files.update(os.path.join(root, path) for path in paths)
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    return Photographs(root, sorted(os.path.relpath(file, root) for file in files))


def read_views(images: Sequence[Tensor], view: Callable[[Tensor], Tensor]) -> Tensor:
    """All views (b 3 y x) uint8 of what can be read. Raises ValueError if that is nothing."""
    views = [image for _, image in read(images, view, range(len(images)))]
    if not views:
        raise ValueError(f"none of the {len(images)} images chosen can be read")
    return torch.stack(views)


def note_domain(dataset: str, config: Mapping[str, Any]) -> None:
    """Says so where a network of photographs is shown toy scenes, and the other way round."""
    kinds = ["photographs", "toy scenes"]
    learned, seen = (kinds[each == "toy"] for each in (config.get("dataset", dataset), dataset))
    if learned != seen:
        way = "; --data-dir gives it photographs" * (dataset == "toy")
        print(f"note: the network learned from {learned} and sees {seen}{way}")


def default_size(dataset: str) -> int:
    """The side of views, px: toy scenes as they are drawn, photographs as for their masks."""
    return toy.Dials().size if dataset == "toy" else SIZE


def center_view(size: int) -> Callable[[Tensor], Tensor]:
    """Image (3 y x) or Photograph -> `data.center_square`; a square of `size` stays as it is."""
    return partial(_center_view, size=size)  # a worker process can receive it


def _center_view(image: Tensor | Photograph, size: int) -> Tensor:
    image = image if isinstance(image, Tensor) else image.pixels().image
    return image if image.shape[-2:] == (size, size) else center_square(image, size)
