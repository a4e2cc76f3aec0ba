"""What the notebooks share: figures with captions, checks that can fail, exercises.

A notebook begins with `sys.path[:0] = [".", "notebooks"]; import nb`, which works from its own
folder and from the root of the repository. Nothing of the method stands here.
"""

import inspect
import io
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from IPython.display import Image, Markdown, display  # noqa: E402
from PIL import Image as Pillow  # noqa: E402

from measures.figures import prototype_colors  # noqa: E402

torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 80, "savefig.dpi": 80, "figure.constrained_layout.use": True})


def check(name: str, condition: Any, message: str = "") -> None:
    """Print that a claim holds, or raise AssertionError. message: the numbers, shown either way."""
    numbers = f" ({message})" if message else ""
    if not bool(condition):
        raise AssertionError(f"check failed: {name}{numbers}")
    print(f"check passed: {name}{numbers}")


def exercise(name: str, attempt: Callable[[], Any], expected: Any, tolerance: float = 1e-5) -> None:
    """Print todo (for None), pass, or what is wrong; never raise, so that Run All goes on."""
    try:
        found = attempt()
        if found is None:
            raise NotImplementedError
        difference = (torch.as_tensor(found) - torch.as_tensor(expected)).double().abs().max()
        result = "pass" if difference <= tolerance else f"largest difference {difference:.3g}"
    except NotImplementedError:
        result = "todo"
    except Exception as error:  # whatever a reader's first attempt raises
        result = f"not yet, {type(error).__name__}: {error}"
    print(f"exercise {name}: {result}")


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


def finish(text: str, marks: dict[str, float] | None = None) -> None:
    """Show the current figure, and below it what is drawn and what to look at.

    marks: name -> height of a dashed line. At most 256 colors take a third of the bytes.
    """
    for name, value in (marks or {}).items():
        plt.axhline(value, color="gray", ls="--", lw=1)
        plt.text(1, value, name, ha="right", va="bottom", transform=plt.gca().get_yaxis_transform())
    drawn, small = io.BytesIO(), io.BytesIO()
    plt.savefig(drawn, format="png", bbox_inches="tight")
    plt.close()
    picture = Pillow.open(drawn).convert("RGB").quantize(256, dither=Pillow.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    display(Image(small.getvalue(), format="png"), Markdown(f"*{text}*"))


def as_image(image: Any) -> np.ndarray:
    """(3 y x), (y x 3) or (y x), tensor or array -> (y x 3) or (y x) array."""
    array = np.asarray(image)
    return np.moveaxis(array, 0, -1) if len(array) == 3 and array.ndim == 3 else array


def grid(
    rows: Sequence[Sequence[Any]], text: str, titles: Sequence = (), labels: Sequence = (),
    size: float = 1.35, cmap: str = "viridis", limits: tuple[float, float] | None = None,
    legend: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Rows of images. limits: of (y x) maps, else each has its own; legend: of colors, uint8."""
    columns, (low, high) = max(map(len, rows)), limits or (0, None)
    shape = size * columns + 0.5, size * len(rows) + 0.3
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=shape)
    for axis, image in zip(axes.flat, itertools.chain(*rows)):
        axis.imshow(as_image(image), cmap, vmin=low, vmax=high, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label, fontsize=9)
    if legend:
        patches = [plt.Rectangle((0, 0), 1, 1, color=np.asarray(c) / 255) for c in legend.values()]
        where = dict(loc="outside lower center", ncols=len(patches), columnspacing=1)
        figure.legend(patches, list(legend), frameon=False, fontsize=9, handlelength=1, **where)
    finish(text)


def heat(
    matrix: Any, text: str, rows: Sequence = (), columns: Sequence = (), xlabel: str = "",
    ylabel: str = "", limits: tuple | None = None, size: tuple[float, float] = (5.5, 4.0),
) -> None:  # fmt: skip
    """A matrix as colors, a small one with its numbers. rows, columns: names of the ticks."""
    array, paper = np.asarray(matrix, dtype=float), dict(facecolor="w", alpha=0.6, lw=0, pad=1)
    low, high = limits or (array.min(), array.max())
    figure, axis = plt.subplots(figsize=size)
    figure.colorbar(axis.imshow(array, "coolwarm" if low < 0 else "viridis", vmin=low, vmax=high))
    axis.set(xlabel=xlabel, ylabel=ylabel, aspect="auto")
    axis.set_yticks(range(len(rows)), map(str, rows))
    axis.set_xticks(range(len(columns)), map(str, columns))
    for (i, j), value in np.ndenumerate(array) if array.size < 50 else ():
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, bbox=paper)
    finish(text)


def curves(lines: dict[str, Sequence[float]], text: str, ylabel: str = "", **more: Any) -> None:
    """Several lines over the steps, each with its own marker. more: of `finish`."""
    _, axis = plt.subplots(figsize=(6.0, 3.2))
    for (name, values), marker in zip(lines.items(), "os^D"):
        axis.plot(values, marker=marker, label=name, ms=4, markevery=len(values) // 8)
    axis.set(xlabel="step", ylabel=ylabel)
    axis.legend(fontsize=9)
    finish(text, **more)


def bars(
    values: dict[str, float], text: str, ylabel: str = "", size: tuple = (5.5, 2.8), **more: Any
) -> None:
    """Named numbers as bars, each with its value. more: of `finish`."""
    _, axis = plt.subplots(figsize=size)
    axis.bar_label(axis.bar(list(values), list(values.values())), fmt="%.2f", fontsize=9)
    axis.set_ylabel(ylabel)
    axis.margins(y=0.15)
    finish(text, **more)


def paint(numbers: Any, count: int) -> np.ndarray:
    """Numbers of groups (... y x) in 0..count-1 -> their colors (... y x 3) in 0..1."""
    return prototype_colors(count)[np.asarray(numbers)]
