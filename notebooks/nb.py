"""What the notebooks share: figures with captions, checks that can fail, exercises.

Slide: none. Paper: none. Differs: ours [U].

A notebook begins with `sys.path[:0] = [".", "notebooks"]; import nb`, which works from its own
folder and from the root of the repository. Importing this file puts the root on the path, takes one
thread, and sets the size of figures. Nothing of the method stands here.
"""

from __future__ import annotations

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
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from IPython.display import Image, Markdown, display  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402
from PIL import Image as Pillow  # noqa: E402
from torch import Tensor  # noqa: E402

from measures.palette import prototype_colors  # noqa: E402

torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 80, "savefig.dpi": 80, "font.size": 10,
                     "figure.constrained_layout.use": True})  # fmt: skip
MARKERS = "os^D"  # of lines, so that color is not the only difference


def check(name: str, condition: Any, message: str = "") -> None:
    """Print that a claim holds, or raise AssertionError. message: the numbers, shown either way."""
    numbers = f" ({message})" if message else ""
    if not bool(condition):
        raise AssertionError(f"check failed: {name}{numbers}")
    print(f"check passed: {name}{numbers}")


def exercise(name: str, attempt: Callable[[], Any], expected: Any, tolerance: float = 1e-5) -> None:
    """Print todo, pass, or the largest difference; never raise, so that Run All goes on.

    attempt: a function without arguments; it returns None (or raises NotImplementedError) as long
    as the exercise is not done. expected: a tensor, an array or a number.
    """
    try:
        found = attempt()
    except NotImplementedError:
        found = None
    except Exception as error:  # whatever a reader's first attempt raises
        print(f"exercise {name}: not yet, {type(error).__name__}: {error}")
        return
    if found is None:
        print(f"exercise {name}: todo")
        return
    found, wanted = (torch.as_tensor(x).detach().double() for x in (found, expected))
    if found.shape != wanted.shape:
        print(f"exercise {name}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
        return
    difference = float((found - wanted).abs().max())
    verdict = "pass" if difference <= tolerance else f"largest difference {difference:.3g}"
    print(f"exercise {name}: {verdict}")


def source(*things: Any) -> None:
    """Show the code of functions, classes or methods as it stands in the modules."""
    for thing in map(inspect.unwrap, things):
        file = Path(inspect.getsourcefile(thing)).resolve()
        place = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
        code = textwrap.dedent(inspect.getsource(thing)).rstrip()
        display(Markdown(f"`{place}`:\n```python\n{code}\n```"))


def caption(text: str) -> None:
    """A line of Markdown below a figure: what is drawn, and what to look at."""
    display(Markdown(f"*{text}*"))


def finish(text: str) -> None:
    """Show the current figure, and the caption below it.

    At most 256 colors: an image of textures then takes a third of the bytes in the notebook.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    plt.savefig(drawn, format="png", bbox_inches="tight")
    plt.close()
    Pillow.open(drawn).convert("RGB").quantize(256, dither=Pillow.Dither.NONE).save(
        small, format="png", optimize=True
    )
    display(Image(small.getvalue(), format="png"))
    caption(text)


def dial(draw: Callable[..., None], **knobs: tuple[Any, Sequence[Any]]) -> None:
    """Show draw(**starts); where a person runs the notebook in Jupyter, sliders show the other
    values.

    draw: draws one figure with its caption. knobs: name=(start, values). Jupyter's server names the
    notebook in JPY_SESSION_NAME; without it nobody could move a slider, and none is shown.
    """
    if "JPY_SESSION_NAME" not in os.environ:
        draw(**{name: start for name, (start, _) in knobs.items()})
        return
    import ipywidgets  # comes with jupyter

    ipywidgets.interact(draw, **{
        name: ipywidgets.SelectionSlider(options=list(values), value=start, continuous_update=False)
        for name, (start, values) in knobs.items()
    })  # fmt: skip


def as_image(image: Any) -> np.ndarray:
    """(3 y x), (y x 3) or (y x), tensor or array -> (y x 3) or (y x) array."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = np.moveaxis(array, 0, -1)
    return array


def grid(
    rows: Sequence[Sequence[Any]], text: str, titles: Sequence = (), labels: Sequence = (),
    size: float = 1.35, cmap: str = "viridis", limits: tuple[float, float] | None = None,
    legend: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Rows of images with a caption: a film strip, attention maps, scenes above their truth.

    rows: images of any size, (3 y x), (y x 3) or (y x); None leaves a gap. titles: one per column;
    labels: one per row; limits: of the color scale of (y x) maps, the same for all; None: 0 to the
    largest value of each map. legend: names of colors (3) uint8, below the images.
    """
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, squeeze=False,
                           figsize=(size * columns + 0.5, size * len(rows) + 0.3))  # fmt: skip
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is not None:
                array = as_image(image)
                low, high = limits or (0, None)
                axes[i, j].imshow(array, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label, fontsize=9)
    if legend:
        patches = [Patch(color=np.asarray(color) / 255, label=n) for n, color in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=9,
                      frameon=False, handlelength=1, columnspacing=1)  # fmt: skip
    finish(text)


def heat(
    matrix: Any, text: str, rows: Sequence[Any] = (), columns: Sequence[Any] = (), xlabel: str = "",
    ylabel: str = "", cmap: str = "viridis", limits: tuple[float, float] | None = None,
    numbers: str = "", size: tuple[float, float] = (5.5, 4.0),
) -> None:  # fmt: skip
    """A matrix as colors, with its scale beside it and a caption.

    rows, columns: names of the ticks; numbers: a format such as ".2f" writes every value in its
    cell; limits: of the color scale.
    """
    array = as_image(matrix).astype(float)
    low, high = limits or (array.min(), array.max())
    figure, axis = plt.subplots(figsize=size)
    drawn = axis.imshow(array, cmap=cmap, vmin=low, vmax=high, aspect="auto",
                        interpolation="nearest")  # fmt: skip
    figure.colorbar(drawn)
    if len(rows):
        axis.set_yticks(range(len(rows)), [str(name) for name in rows])
    if len(columns):
        axis.set_xticks(range(len(columns)), [str(name) for name in columns])
    axis.set(xlabel=xlabel, ylabel=ylabel)
    for i, j in np.ndindex(*array.shape if numbers else (0, 0)):
        dark = np.dot(drawn.cmap(drawn.norm(array[i, j]))[:3], (0.3, 0.6, 0.1)) < 0.5
        axis.text(j, i, format(array[i, j], numbers), ha="center", va="center", fontsize=9,
                  color="white" if dark else "black")  # fmt: skip
    finish(text)


def curves(
    lines: dict[str, Sequence[float]], text: str, xlabel: str = "step", ylabel: str = "",
    marks: dict[str, float] | None = None, size: tuple[float, float] = (6.0, 3.2),
) -> None:  # fmt: skip
    """Several lines over their index, each with its own marker; dashed gray marks at heights that
    mean something.
    """
    _, axis = plt.subplots(figsize=size)
    colors = prototype_colors(len(lines) + 1) / 255
    for color, marker, (name, values) in zip(colors, itertools.cycle(MARKERS), lines.items()):
        axis.plot(values, color=color, label=name, marker=marker, ms=4, markevery=len(values) // 8)
    for name, height in (marks or {}).items():
        axis.axhline(height, color="gray", ls="--", lw=1)
        axis.annotate(name, (1, height), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=9, color="gray")  # fmt: skip
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=9)
    finish(text)


def bars(values: dict[str, float], text: str, ylabel: str = "",
         mark: tuple[str, float] | None = None, size: tuple = (5.5, 2.8)) -> None:  # fmt: skip
    """Named numbers as bars, each with its value; mark: a name and a height, such as chance."""
    _, axis = plt.subplots(figsize=size)
    drawn = axis.bar(list(values), list(values.values()), color=prototype_colors(5)[4] / 255)
    axis.bar_label(drawn, fmt="%.2f", fontsize=9)
    if mark:
        axis.axhline(mark[1], color="gray", ls="--", lw=1)
        axis.annotate(mark[0], (1, mark[1]), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", fontsize=9, color="gray")  # fmt: skip
    axis.set_ylabel(ylabel)
    axis.margins(y=0.15)
    finish(text)


def paint(numbers: Any, count: int) -> np.ndarray:
    """Numbers of groups (... y x) in 0..count-1 -> colors (... y x 3) uint8, as in all figures."""
    return prototype_colors(count)[as_image(numbers)]
