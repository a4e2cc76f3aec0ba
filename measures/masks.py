"""The groups of photographs as files: a mask beside each, and what is in all of them together.

FOLDER/NAME.png         prototypes as a palette image of the photograph's size; 16 bits from k = 257
FOLDER/segments.jsonl   a line per photograph: {prototype: [share of the pixels, mean similarity]}
FOLDER/prototypes.json  color, name, share, images and nearest segments of every prototype
FOLDER/contact_sheet.png
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Mapping, Sequence
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

from engine.files import write_atomically, write_json
from engine.images import BadImage, Photograph, Photographs
from grouping import GroupingNetwork
from measures.figures import grid, prototype_colors
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


def write_mask(file: Path, mask: Image.Image, palette: bytes, names: Mapping[int, str]) -> None:
    """A PNG with the palette, and the names as text. Raises OSError."""
    about = PngInfo()
    for number, name in names.items():
        about.add_itxt(f"prototype {number}", name)
    if mask.mode in ("L", "P"):
        mask.putpalette(palette)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda out: mask.save(out, "PNG", pnginfo=about))


def file_names(photos: Photographs) -> list[str]:
    """NAME.png for each photograph; where two differ in their ending only, NAME.jpg.png."""
    stems = [str(Path(path).with_suffix("")) for path in photos.paths]
    count = Counter(stems)
    return [f"{s if count[s] == 1 else p}.png" for s, p in zip(stems, photos.paths.tolist())]


def read_names(file: Path | None, k: int) -> dict[int, str]:
    """Names of prototypes from lines such as "3 sky"; {} without a file. Raises ValueError."""
    names: dict[int, str] = {}
    for line in file.read_text(encoding="utf-8-sig").splitlines() if file else ():
        number, _, name = line.strip().partition(" ")
        if line.strip() and not (number.isdecimal() and int(number) < k and name.strip()):
            expected = f"expected a prototype from 0 to {k - 1} and its name, such as '3 sky'"
            raise ValueError(f"{file}: {line.strip()!r}: {expected}")
        if line.strip():
            names[int(number)] = name.strip()
    return names


def resume(file: Path, made_by: Mapping[str, Any]) -> set[str]:
    """The photographs in segments.jsonl. Raises ValueError where another network has made it."""
    text = file.read_bytes() if file.exists() else b""
    text = text[: text.rfind(b"\n") + 1] or json.dumps(made_by).encode() + b"\n"
    write_atomically(file, lambda out: out.write(text))  # without a line that was cut off
    first, *lines = map(json.loads, text.splitlines())
    if first != made_by:
        raise ValueError(f"{file} is of another network or --size: give another --output")
    return {line["photo"] for line in lines}


def write_masks(
    network: GroupingNetwork, photos: Photographs, folder: Path, size: int,
    names: Mapping[int, str], workers: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Every file above, for the photographs that lack a mask -> the contents of prototypes.json,
    and the shares of each photograph. Raises ValueError, OSError.
    """
    weights, k = network.prototypes.weight, network.prototypes.num_embeddings
    digest = hashlib.sha256(weights.detach().cpu().numpy().tobytes()).hexdigest()
    colors, lines, files = prototype_colors(k), folder / "segments.jsonl", file_names(photos)
    palette = np.uint8(colors * 255 + 0.5).tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    done = resume(lines, dict(prototypes=digest, size=size))
    ready = [photos.name(i) in done and (folder / files[i]).is_file() for i in range(len(photos))]
    for i in (i for i, is_ready in enumerate(ready) if is_ready and names):
        with Image.open(folder / files[i]) as mask:  # its prototypes may have got other names
            write_mask(folder / files[i], mask.copy(), palette, names)
    todo = [i for i, is_ready in enumerate(ready) if not is_ready]
    photographs = Subset(photos, todo)
    for index, (image, whole) in stream(photographs, partial(view, size=size), 1, workers, "masks"):
        i = todo[int(index)]
        mask, found = segments_of(network, image, whole[0].tolist())
        write_mask(folder / files[i], mask, palette, names)
        if photos.name(i) not in done:
            with lines.open("a", encoding="utf-8") as out:
                out.write(json.dumps(dict(photo=photos.name(i), segments=found)) + "\n")
    ready = [i for i, file in enumerate(files) if (folder / file).is_file()]
    draw_sheet(folder, photos, [(i, files[i]) for i in ready], palette)
    result = summary(lines, colors, names)
    write_json(folder / "prototypes.json", result["prototypes"])
    return result


def summary(file: Path, colors: np.ndarray, names: Mapping[int, str]) -> dict[str, Any]:
    """What segments.jsonl says of each prototype, and the shares of each photograph."""
    shares, images, photos = np.zeros(len(colors)), Counter(), {}
    nearest: list[list[tuple[float, str]]] = [[] for _ in colors]
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()[1:]):
        photos[line["photo"]] = {k: share for k, (share, _) in line["segments"].items()}
        for number, (share, score) in line["segments"].items():
            shares[int(number)] += share
            images[int(number)] += 1
            nearest[int(number)].append((score, line["photo"]))
            nearest[int(number)] = heapq.nlargest(NEAREST, nearest[int(number)])
    prototypes = [
        dict(
            prototype=number,
            name=names.get(number, ""),
            color=to_hex(colors[number]),
            share=round(shares[number] / max(len(photos), 1), 6),
            images=images[number],
            nearest=[dict(photo=photo, similarity=score) for score, photo in nearest[number]],
        )
        for number in range(len(colors))
    ]
    return dict(prototypes=prototypes, photos=photos)


def draw_sheet(
    folder: Path, photos: Photographs, ready: Sequence[tuple[int, str]], palette: bytes
) -> None:
    """Up to SHOWN photographs, evenly spaced, each beside its mask, two to a row."""
    pairs, colors = [], np.frombuffer(palette, np.uint8).reshape(-1, 3)
    for i, file in (ready[place] for place in spaced(len(ready), SHOWN) if ready):
        small, _ = view(photos[i], 160)
        with Image.open(folder / file) as mask:
            ids = np.asarray(mask.resize((small.shape[2], small.shape[1]), Image.NEAREST))
        pairs += [np.asarray(small.permute(1, 2, 0)) / 255, colors[ids] / 255]
    rows = [pairs[i : i + 4] for i in range(0, len(pairs), 4)]
    if rows:
        title = "Photographs and their masks: a color means a prototype"
        grid(title, rows, side=1.9)[0].savefig(folder / "contact_sheet.png", dpi=110)
