"""The groups of photographs as files: a mask beside each, and what is in all of them together.

FOLDER/NAME.png         prototypes as a palette image of the photograph's size; 16 bits from k = 257
FOLDER/prototypes.json  color, name, share, images and nearest segments of every prototype
FOLDER/contact_sheet.png
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import Subset

from engine.files import read_lines, write_atomically, write_json
from engine.images import BadImage, Photograph, Photographs
from grouping import GroupingNetwork
from measures.figures import as_images, grid, prototype_colors, save
from measures.groups import winner
from measures.streams import spaced, stream
from photometric import normalize

LONGEST = 1024  # side px at which a mask is decided; larger ones repeat its pixels [U]
NARROWEST = 32  # px; in smaller views a backbone's padding is wider than its map
NEAREST, SHOWN = 5, 12  # segments of a prototype; photographs on the contact sheet


def view(photo: Photograph, size: int) -> tuple[Tensor, Tensor]:
    """The whole photograph with its short side at `size` px, or its long side at 8 times that:
    (3 y x) uint8, and its own size (2), px. Raises BadImage.
    """
    whole = photo.shape[1:]
    factor = min(size / min(whole), 8 * size / max(whole))
    small = [round(side * factor) for side in whole]
    if min(small) < NARROWEST:
        raise BadImage(photo.name, f"{whole[0]} x {whole[1]} px (height x width) is too narrow")
    image = photo.pixels(1 / factor).image[None].float()
    image = F.interpolate(image, small, mode="bilinear", antialias=True)[0]
    return image.round().to(torch.uint8), torch.tensor(whole)


@torch.no_grad()
def segments_of(
    network: GroupingNetwork, image: Tensor, whole: Sequence[int]
) -> tuple[Image.Image, dict[int, tuple[float, float]]]:
    """image (1 3 y x) uint8 -> the mask of size `whole` (y, x), and of each prototype in it the
    share of the pixels and the mean similarity of its cells.
    """
    similarity = network(normalize(image.to(network.prototypes.weight.device)))[1]
    factor = min(1, LONGEST / max(whole))
    ids = winner(similarity, tuple(max(1, round(side * factor)) for side in whole))[0]
    kind = np.uint8 if similarity.shape[1] <= 256 else np.uint16
    mask = Image.fromarray(ids.cpu().numpy().astype(kind)).resize(whole[::-1], Image.NEAREST)
    best, owner = similarity[0].max(dim=0)  # over k
    numbers, counts = np.unique(np.asarray(mask), return_counts=True)
    found = {}
    for number, count in zip(numbers.tolist(), (counts / counts.sum()).tolist()):
        mine = best[owner == number]
        # A mask that is enlarged can have a prototype that wins no cell
        score = mine.mean() if len(mine) else similarity[0, number].max()
        found[number] = (round(count, 6), round(score.item(), 6))
    return mask, found


def write_mask(file: Path, mask: Image.Image, palette: bytes, about: Mapping[str, Any]) -> None:
    """A PNG with the palette, and with what is known about it as JSON in a text. Raises OSError."""
    text = PngInfo()
    text.add_itxt("slotcon", json.dumps(about))
    if mask.mode in ("L", "P"):
        mask.putpalette(palette)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda out: mask.save(out, "PNG", pnginfo=text))


def read_about(file: Path, network: str) -> dict[str, Any] | None:
    """What a mask says of itself; None: there is none, or one of another network or size."""
    try:
        with Image.open(file) as mask:
            about = json.loads(mask.text["slotcon"])
    except (OSError, AttributeError, KeyError, ValueError):
        return None
    return about if about["network"] == network else None


def mask_files(photos: Photographs, folder: Path) -> list[Path]:
    """NAME.png for each photograph; where two differ in their ending only, NAME.jpg.png."""
    stems = [str(Path(path).with_suffix("")) for path in photos.paths]
    count = Counter(stems)
    names = [s if count[s] == 1 else path for s, path in zip(stems, photos.paths.tolist())]
    return [folder / f"{name}.png" for name in names]


def read_names(file: Path | None, k: int) -> dict[int, str]:
    """Names of prototypes from lines such as "3 sky"; {} without a file. Raises ValueError."""
    names = {}
    for line in filter(None, read_lines(file) if file else ()):
        number, _, name = line.partition(" ")
        if not (number.isdecimal() and int(number) < k and name):
            expected = f"expected a prototype from 0 to {k - 1} and its name, such as '3 sky'"
            raise ValueError(f"{file}: {line!r}: {expected}")
        names[int(number)] = name.strip()
    return names


def write_masks(
    network: GroupingNetwork, photos: Photographs, folder: Path, size: int,
    names: Mapping[int, str], workers: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """All files, for the photographs that lack a mask -> the contents of prototypes.json, and the
    shares of each photograph. Raises OSError.
    """
    weights, files = network.prototypes.weight.detach().cpu(), mask_files(photos, folder)
    by = f"{hashlib.sha256(weights.numpy().tobytes()).hexdigest()} {size}"
    colors = prototype_colors(len(weights))
    palette = np.uint8(colors * 255 + 0.5).tobytes()
    todo = []
    for i, file in enumerate(files):
        about = read_about(file, by)
        if about is None:
            todo.append(i)
        elif about["names"] != named(about["segments"], names):
            with Image.open(file) as mask:
                about["names"] = named(about["segments"], names)
                write_mask(file, mask.copy(), palette, about)
    todo_photos, see = Subset(photos, todo), partial(view, size=size)
    for place, (image, whole) in stream(todo_photos, see, 1, workers, "masks"):
        mask, segments = segments_of(network, image, whole[0].tolist())
        about = dict(network=by, segments=segments, names=named(segments, names))
        write_mask(files[todo[int(place)]], mask, palette, about)
    known = (read_about(file, by) for file in files)
    pairs = ((path, about) for path, about in zip(photos.paths.tolist(), known) if about)
    result = summary(pairs, colors, names)
    write_json(folder / "prototypes.json", result["prototypes"])
    draw_sheet(folder, photos, files, palette)
    return result


def named(segments: Mapping, names: Mapping[int, str]) -> dict[str, str]:
    """The names of the prototypes in a mask."""
    return {str(k): names[int(k)] for k in segments if int(k) in names}


def summary(
    known: Iterator[tuple[str, dict[str, Any]]], colors: np.ndarray, names: Mapping[int, str]
) -> dict[str, Any]:
    """From photographs and what their masks say: each prototype, and the shares in each."""
    photos: dict[str, dict[str, float]] = {}
    nearest: list[list[tuple[float, str]]] = [[] for _ in colors]
    for photo, about in known:
        photos[photo] = {k: share for k, (share, _) in about["segments"].items()}
        for k, (_, score) in about["segments"].items():
            best = nearest[int(k)]
            best[:] = heapq.nlargest(NEAREST, [*best, (score, photo)])
    prototypes = []
    for k, color in enumerate(colors):
        shares = [of_photo[str(k)] for of_photo in photos.values() if str(k) in of_photo]
        prototypes.append(
            dict(
                prototype=k,
                name=names.get(k, ""),
                color=to_hex(color),
                share=round(sum(shares) / max(len(photos), 1), 6),
                images=len(shares),
                nearest=[dict(photo=photo, similarity=score) for score, photo in nearest[k]],
            )
        )
    return dict(prototypes=prototypes, photos=photos)


def draw_sheet(folder: Path, photos: Photographs, files: Sequence[Path], palette: bytes) -> None:
    """Up to SHOWN photographs, evenly spaced, each beside its mask, two to a row."""
    ready = [i for i, file in enumerate(files) if file.is_file()]
    pairs, colors = [], np.frombuffer(palette, np.uint8).reshape(-1, 3)
    for i in (ready[place] for place in spaced(len(ready), SHOWN) if ready):
        small, _ = view(photos[i], 160)
        with Image.open(files[i]) as mask:
            ids = np.asarray(mask.resize(small.shape[:0:-1], Image.NEAREST))
        pairs += [as_images(small[None])[0], colors[ids] / 255]
    if pairs:
        rows = [pairs[i : i + 4] for i in range(0, len(pairs), 4)]
        title = "Photographs and their masks: a color means a prototype"
        save(grid(title, rows, side=1.9)[0], folder / "contact_sheet.png", 110)
