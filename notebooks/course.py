"""What the notebooks share beside their figures: checks, exercises, listings, and what they load.

`import course` finds the modules of the repository, from the folder of the notebooks and from its
root. Nothing of the method stands here.
"""

import functools
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from IPython.display import Image, Markdown, display
from PIL import Image as Pillow

import comparisons
import plots
import recipes
import solutions
import toy
from comparisons.kmeans import nearest_center
from engine import checkpoints
from engine.options import chosen_for
from measures.datasets import UNSEEN
from measures.figures import color_groups
from measures.groups import kmeans, segment, winner
from photometric import Photometric, normalize
from slotcon import SlotCon

torch.set_num_threads(1)


def check(name: str, condition: Any, message: str = "") -> None:
    """Print that a claim holds, or raise AssertionError. message: the numbers, shown either way."""
    numbers = f" ({message})" if message else ""
    if not bool(condition):
        raise AssertionError(f"check failed: {name}{numbers}")
    print(f"check passed: {name}{numbers}")


def exercise(name: str, attempt: Any) -> None:
    """Print todo (for None or ...), pass, or what is wrong; never raise, so that Run All goes on.

    attempt: a function, or a value; name: of `solutions.EXERCISES`.
    """
    print(f"exercise {name}: {solutions.result(name, attempt)}")


def source(*things: Any) -> None:
    """Show the code of functions, classes or methods as it stands in the modules."""
    for thing in map(inspect.unwrap, things):
        file = Path(inspect.getsourcefile(thing)).resolve().relative_to(ROOT)
        code = textwrap.dedent(inspect.getsource(thing)).rstrip()
        display(Markdown(f"`{file}`:\n```python\n{code}\n```"))


def dial(draw: Callable[..., None], **knobs: tuple[Any, Sequence[Any]]) -> None:
    """Show draw at the starts; in Jupyter, sliders show the rest. knobs: name=(start, values)."""
    if "JPY_SESSION_NAME" not in os.environ:
        return draw(**{name: start for name, (start, _) in knobs.items()})
    from ipywidgets import SelectionSlider, interact  # comes with jupyter

    interact(draw, **{n: SelectionSlider(options=v, value=s) for n, (s, v) in knobs.items()})


@functools.cache
def trained() -> tuple[SlotCon, recipes.Config, np.ndarray]:
    """toy.pth in training mode, its configuration, the colors (k 3) of its prototypes."""
    config, _ = recipes.parse(["--preset", "toy"])
    model = SlotCon(**chosen_for(SlotCon, config))
    model.load_state_dict(checkpoints.read(ROOT / "notebooks" / "toy.pth").contents["model"])
    scenes = toy.ToyImages(UNSEEN, 64)
    with torch.no_grad():
        groups, _ = segment(model.teacher.eval(), scenes.images)
    model.teacher.train()
    return model, config, plots.class_colors(groups, scenes.semantic, config.num_prototypes)


def painted(kind: str, images: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What slots_<kind>.pth paint of images (n c y x), (n c y/2 x/2) with normalize(x) / 4 + 0.5,
    and which slot wins each pixel in the last round (n y x). Slots start from the seed's noise.
    """
    name = {"flow": "motion", "depth": "depth"}.get(kind, "slot_attention")
    system = comparisons.build(name, trained()[1]).eval()
    file = ROOT / "notebooks" / f"slots_{kind}.pth"
    system.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        torch.manual_seed(seed)
        image = rearrange(system.paint(normalize(images))[0], "n c (y x) -> n c y x", y=32)
        torch.manual_seed(seed)
        owner = winner(system.maps(normalize(images)), images.shape[-2:])
    return image / 4 + 0.5, owner


def textures(seed: int, count: int = 128) -> tuple[Any, torch.Tensor, torch.Tensor, list]:
    """Scenes; two views in other colors (b v 3 y x); features (b d h w) of the scenes, and of both
    views with noise. They are no network's: mean sizes of 64 random filters' answers, d = 16
    numbers of equal variance.
    """
    scenes, generator = toy.ToyImages(seed, count), torch.Generator().manual_seed(seed)
    filters = torch.randn(64, 1, 9, 9, generator=generator)
    filters = filters * torch.outer(*[torch.hann_window(9, periodic=False)] * 2)
    filters = F.normalize(filters - filters.mean((2, 3), keepdim=True), dim=(2, 3))
    recolor = Photometric(**chosen_for(Photometric, recipes.PRESETS["toy"]))
    views = recolor(torch.stack([scenes.images] * 2, dim=1), generator)
    maps = []
    for images in (normalize(scenes.images), *views.unbind(1)):
        gray = F.pad(images.mean(1, keepdim=True), (4,) * 4, mode="reflect")
        sizes = F.pad(F.conv2d(gray, filters).abs(), (4,) * 4, mode="reflect")
        maps.append(F.avg_pool2d(sizes, 12, 4)[:, :, ::2, ::2])
    rows = rearrange(maps[0], "b c h w -> (b h w) c")
    _, scale, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    whiten = axes[:16].T / scale[:16] * len(rows) ** 0.5
    maps = [x - rows.mean(0)[:, None, None] for x in maps]
    plain, *two = (einsum(x, whiten, "b c h w, c d -> b d h w") for x in maps)
    return scenes, views, plain, [x + torch.randn(x.shape, generator=generator) for x in two]


def clusters_of(pixels: torch.Tensor, k: int) -> torch.Tensor:
    """Pixels (c y x) of one image -> the number of each pixel's cluster (y x), by k-means."""
    rows = rearrange(pixels.float(), "c y x -> (y x) c")
    centers = kmeans(rows.numpy(), min(k, len(rows.unique(dim=0))))
    return nearest_center(rows, torch.from_numpy(centers).float()).reshape(pixels.shape[1:])


def in_colors(groups: torch.Tensor, regions: torch.Tensor) -> list:
    """Groups of single images (n y x), each in the color of the region that it covers best."""
    return [color_groups(*pair)[0] for pair in zip(groups.split(1), regions.long().split(1))]


def kept(first: torch.Tensor, second: torch.Tensor, k: int) -> np.ndarray:
    """Groups of the same places in two views (n y x) -> (k) the share of each group's pixels, in
    either view, that are in it in both; nan for a group without a pixel.
    """
    pixels = first[first == second], torch.cat([first, second])
    both, either = (x.flatten().bincount(minlength=k).numpy() for x in pixels)
    return 2 * both / np.where(either, either, np.nan)


def measured(file: str, row: str, column: int) -> list[float]:
    """The numbers in one cell of a table in benchmarks/, such as median, least and most."""
    table = (ROOT / "benchmarks" / file).read_text()
    line = re.search(rf"^\| {re.escape(row)} \|(.*)", table, re.M)
    return [float(number) for number in re.findall(r"\d\.\d+", line[1].split("|")[column])]


def photograph() -> torch.Tensor:
    """The second photograph in docs/images/photos.jpg, reduced: uint8 (3 64 64)."""
    with Pillow.open(ROOT / "docs" / "images" / "photos.jpg") as sheet:
        square = sheet.crop((7, 317, 213, 523)).resize((64, 64), Pillow.Resampling.BOX)
    return torch.from_numpy(np.moveaxis(np.asarray(square), -1, 0).copy())


def photographs(text: str) -> None:
    """Show docs/images/photos.jpg, reduced, and a text below it."""
    small = io.BytesIO()
    with Pillow.open(ROOT / "docs" / "images" / "photos.jpg") as sheet:
        sheet.resize((800, 800 * sheet.height // sheet.width)).save(small, "jpeg", quality=70)
    display(Image(small.getvalue(), format="jpeg"), Markdown(f"*{text}*"))
