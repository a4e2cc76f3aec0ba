"""One image of all systems: rows are systems, columns the same unseen scenes, each with its groups.

Slide: "Image-level, pixel-level, and object-level contrastive learning", and what follows it.
Paper: none.
Differs: ours [U].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from einops import rearrange
from torch import Tensor

from measures.palette import prototype_colors


def save_comparison(
    file: Path,
    scenes: Tensor,
    semantic: Tensor,
    regions: Tensor,
    groups: Mapping[str, Tensor],
    title: str,
) -> None:
    """scenes (n 3 y x) uint8, semantic and regions (n y x): the truth; groups: label of the row ->
    (n y x). Draws to a file. One color is one group of a row: colors of two rows have nothing in
    common, and in rows of slots nothing from scene to scene either.
    """
    from matplotlib.figure import Figure  # draws to files, with no window and no global state

    rows: dict[str, np.ndarray] = {"scene": rearrange(scenes, "n c y x -> n y x c").numpy()}
    numbered = {"truth: classes": semantic, "truth: objects": regions, **groups}
    for label, numbers in numbered.items():
        colors = prototype_colors(max(int(numbers.max()) + 1, 16))
        rows[label] = colors[numbers.long().numpy()]
    n = len(scenes)
    figure = Figure((1.15 * n + 2.6, 1.17 * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), n, squeeze=False)
    for (label, images), line in zip(rows.items(), axes):
        for image, axis in zip(images, line):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.savefig(file, dpi=90)
