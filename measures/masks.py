"""The groups of photographs as files: a mask beside each, and what is in all of them together.

FOLDER/NAME.png         prototypes as a palette image of the photograph's size; 16 bits from k = 257
FOLDER/prototypes.json  color, name, share, images and nearest segments of every prototype
FOLDER/contact_sheet.jpg
"""

import hashlib
import json
from collections import Counter, defaultdict
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

from engine.checkpoints import weights_digest
from engine.files import found_in, read_lines, remove_leftovers, write_atomically, write_json
from engine.images import BadImage, Photograph, Photographs, search
from engine.log import progress
from grouping import GroupingNetwork
from measures.figures import as_images, grid, prototype_colors, save
from measures.groups import winner
from measures.streams import spaced, stream
from photometric import normalize

LONGEST = 1024  # side px at which a mask is decided; larger ones repeat its pixels [U]
NARROWEST = 32  # px; in smaller views a backbone's padding is wider than its map
NEAREST = 5  # segments of a prototype
SHOWN, IN_LEGEND = 12, 24  # photographs and, most used first, prototypes on the contact sheet

Segments = dict[str, tuple[float, float]]  # prototype -> share of pixels, similarity of its cells


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
) -> tuple[Image.Image, Segments]:
    """image (1 3 y x) uint8 -> the mask of size `whole` (y, x), and what is in it."""
    similarity = network(normalize(image.to(network.prototypes.weight.device)))[1]
    factor = min(1, LONGEST / max(whole))
    ids = winner(similarity, tuple(max(1, round(side * factor)) for side in whole))[0]
    kind = np.uint8 if similarity.shape[1] <= 256 else np.uint16
    mask = Image.fromarray(ids.cpu().numpy().astype(kind)).resize(whole[::-1], Image.NEAREST)
    best, owner = similarity[0].max(dim=0)  # over k
    numbers, counts = np.unique(np.asarray(mask), return_counts=True)
    found = {}
    for number, share in zip(numbers.tolist(), (counts / counts.sum()).tolist()):
        mine = best[owner == number]
        # A mask that is enlarged can have a prototype that wins no cell
        score = mine.mean() if len(mine) else similarity[0, number].max()
        found[str(number)] = round(share, 6), round(score.item(), 6)
    return mask, found


def require_own(folder: Path) -> None:
    """Raises ValueError where a folder, or one below it, holds images that are not of masks: they
    would be replaced, or left out by the next search, which knows masks by prototypes.json.
    """
    own = (folder / "prototypes.json").exists()
    if found := not own and search(folder, ".", defaultdict(list)):
        reason = f"holds images, such as {found[0]}: masks need a folder of their own"
        raise ValueError(f"--output {folder} {reason}, such as {folder / 'masks'}")


def write_mask(file: Path, mask: Image.Image, palette: np.ndarray, about: Mapping) -> None:
    """A PNG with the palette (k 3), and with JSON in a text. Raises OSError."""
    text = PngInfo()
    text.add_itxt("slotcon", json.dumps(about))
    if mask.mode == "L":
        mask.putpalette(palette.tobytes())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda out: mask.save(out, "PNG", pnginfo=text))


def read_segments(file: Path, made_by: str, photo: Path) -> Segments | None:
    """What is in a mask; None: there is no mask, or one made otherwise or of another photograph.
    Raises ValueError for a file that is no mask of ours.
    """
    try:
        with Image.open(file) as mask:
            about = json.loads(mask.text["slotcon"])
        same = about["made_by"] == made_by and about["photo"] == digest(photo)
        return about["segments"] if same else None
    except FileNotFoundError:
        return None
    except (OSError, AttributeError, KeyError, ValueError):
        raise ValueError(f"{file} is no mask of this program: give another --output") from None


def digest(photo: Path) -> str:
    """Of its bytes. Raises OSError."""
    return hashlib.sha256(photo.read_bytes()).hexdigest()


def mask_files(paths: Sequence[str], folder: Path) -> list[Path]:
    """NAME.png of each photograph; where another one is called NAME or NAME.*, NAME.jpg.png."""
    stems = [str(Path(path).with_suffix("")) for path in paths]
    count = Counter([*stems, *paths])
    return [folder / f"{s if count[s] == 1 else path}.png" for s, path in zip(stems, paths)]


def read_names(file: Path | None, k: int) -> dict[int, str]:
    """Names of prototypes from lines such as "3 sky"; {} without a file. Raises ValueError."""
    names = {}
    if file and not file.is_file():
        raise ValueError(f"--names {file}: no such file; {found_in(file)}")
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
    shares of each photograph. Raises ValueError, OSError.
    """
    made_by = repr((size, sorted(names.items()), weights_digest(network)))
    about = dict(made_by=hashlib.sha256(made_by.encode()).hexdigest(), names=names)
    colors = prototype_colors(network.prototypes.num_embeddings)
    palette, files = np.uint8(colors * 255 + 0.5), mask_files(photos.paths.tolist(), folder)
    paths = [Path(photos.root, path) for path in photos.paths]
    pairs = progress(zip(files, paths), len(files), "masks that are there")
    known = [read_segments(file, about["made_by"], path) for file, path in pairs]
    todo = [i for i, segments in enumerate(known) if segments is None]
    others = sum(files[i].exists() for i in todo)
    if done := len(files) - len(todo):
        print(f"{done} of {len(files)} masks are there", flush=True)
    if others:
        print(f"{others} masks of another network, size, names or photograph are made again")
    remove_leftovers(folder)
    summary = folder / "prototypes.json"  # by which a search for photographs knows the folder
    write_json(summary, [])  # until all masks are of this network
    todo_photos, see = Subset(photos, todo), partial(view, size=size)
    for place, (image, whole) in stream(todo_photos, see, 1, workers, "masks"):
        mask, known[todo[place]] = segments_of(network, image, whole[0].tolist())
        own = dict(photo=digest(paths[todo[place]]), segments=known[todo[place]])
        write_mask(files[todo[place]], mask, palette, about | own)
    found = {photo: segments for photo, segments in zip(photos.paths.tolist(), known) if segments}
    masks = {i: files[i] for i, segments in enumerate(known) if segments}
    if stale := {*folder.rglob("*.png")} - {*masks.values()}:
        print(f"{len(stale)} other files .png in {folder} are not of these photographs, first "
              f"{min(stale)}")  # fmt: skip
    if not found:
        raise ValueError("none of the photographs can be read")
    prototypes = [about_prototype(k, found, color, names) for k, color in enumerate(colors)]
    write_json(summary, prototypes)
    used = sorted((p for p in prototypes if p["images"]), key=lambda p: -p["share"])
    legend = {f"{p['prototype']} {p['name']}": p["color"] for p in used[:IN_LEGEND]}
    draw_sheet(folder, photos, masks, palette, legend)
    shares = {photo: {k: share for k, (share, _) in each.items()} for photo, each in found.items()}
    return dict(prototypes=prototypes, photos=shares)


def about_prototype(
    k: int, found: Mapping[str, Segments], color: np.ndarray, names: Mapping[int, str]
) -> dict[str, Any]:
    """A prototype in all photographs: found, by their names."""
    mine = {photo: each[str(k)] for photo, each in found.items() if str(k) in each}
    best = sorted(((score, photo) for photo, (_, score) in mine.items()), reverse=True)
    return dict(
        prototype=k,
        name=names.get(k, ""),
        color=to_hex(color),
        share=round(sum(share for share, _ in mine.values()) / max(len(found), 1), 6),
        images=len(mine),
        nearest=[dict(photo=photo, similarity=score) for score, photo in best[:NEAREST]],
    )


def draw_sheet(
    folder: Path, photos: Photographs, masks: Mapping[int, Path], palette: np.ndarray,
    legend: Mapping[str, str],
) -> None:  # fmt: skip
    """Up to SHOWN photographs, evenly spaced, each beside its mask, two to a row."""
    cells = []
    for i in (list(masks)[place] for place in spaced(len(masks), SHOWN)):
        small, _ = view(photos[i], 160)
        with Image.open(masks[i]) as mask:
            ids = np.asarray(mask.resize(small.shape[:0:-1], Image.NEAREST))
        cells += [as_images(small[None])[0], palette[ids]]
    rows = [cells[i : i + 4] for i in range(0, len(cells), 4)]
    title = "Photographs and their masks: a color means a prototype"
    save(grid(title, rows, side=1.9, legend=legend), folder / "contact_sheet.jpg", 110)
