"""Every pixel is assigned to the prototypes that it resembles: pixel-level deep clustering.

Slide: "Semantic grouping with pixel-level deep clustering".
Paper: section 3.1.
Read next: slots.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from torch import Tensor, nn

from backbone import Projector, build_backbone


def full_precision(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every prototype and every pixel embedding.

    similarity[b,k,h,w] = <p_k, z_bhw> / (|p_k| |z_bhw|)

    embeddings z (b d h w), prototypes p (k d), neither normalized -> (b k h w) in [-1, 1].
    """
    # In float32: a half-precision cosine has steps of 1/256, 6 % of a temperature of 0.07.
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(full_precision(embeddings), dim=1)  # over d
        p = F.normalize(full_precision(prototypes), dim=1)  # over d
        return einsum(p, z, "k d, b d h w -> b k h w")


def assignment(similarity: Tensor, temperature: float) -> Tensor:
    """Soft assignment of every pixel to the prototypes.

    assignment = softmax_k(similarity / temperature)

    similarity (b k h w); temperature: the student's 0.1, the teacher's 0.07 [P] -> (b k h w), with
    sum 1 over k. Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature of an assignment must be positive, found {temperature}")
    return (similarity / temperature).softmax(dim=1)  # over k


def overlapping(boxes: Tensor) -> Tensor:
    """boxes (b v 4) of `data.Batch` -> (b) bool: the two crops share a part of the scene."""
    return (boxes[:, 0, 2] > boxes[:, 0, 0]) & (boxes[:, 0, 3] > boxes[:, 0, 1])


def inverse_augmentation(maps: Tensor, boxes: Tensor, flipped: Tensor) -> Tensor:
    """Undo crop and flip with one grid, so that cell (h, w) is the same place of the scene in both
    views.

    x_w = left + (right - left) (w + 1/2) / W, and y_h alike

    maps (b c h w): similarity or embeddings of one view; boxes (b 4), flipped (b) bool: of this
    view, as in `data.Batch` -> (b c h w): each map read bilinearly at the centers of the cells of
    its box, from right to left where the view is mirrored; any values for an empty box. Raises
    ValueError where the three disagree on b.
    """
    b, _, h, w = maps.shape
    if boxes.shape != (b, 4) or flipped.shape != (b,):
        raise ValueError(f"{b} maps, but boxes {tuple(boxes.shape)}, flags {tuple(flipped.shape)}")
    maps = full_precision(maps)
    x1, y1, x2, y2 = boxes.to(maps.dtype).unbind(dim=1)
    left, right = torch.where(flipped, x2, x1), torch.where(flipped, x1, x2)
    x = repeat(cell_centers(left, right, w), "b w -> b h w", h=h)
    y = repeat(cell_centers(y1, y2, h), "b h -> b h w", w=w)
    grid = 2 * torch.stack([x, y], dim=-1) - 1  # as grid_sample counts: -1 .. 1
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)


def cell_centers(start: Tensor, end: Tensor, count: int) -> Tensor:
    """start, end (b) -> (b count): the centers of equal cells from start to end."""
    steps = (torch.arange(count, dtype=start.dtype, device=start.device) + 0.5) / count
    return torch.lerp(start[:, None], end[:, None], steps)


class GroupingNetwork(nn.Module):
    """Backbone, projector and prototypes: the part of the student that has a teacher.

    arch, pretrained: of `backbone.build_backbone`; num_prototypes: k; dim_hidden: of the projector;
    dim_out: d. Prototypes start from N(0, 1) [O]. Raises ValueError for a size below 1.
    """

    def __init__(
        self, arch: str, num_prototypes: int, dim_hidden: int = 4096, dim_out: int = 256,
        pretrained: bool = False,
    ):  # fmt: skip
        super().__init__()
        sizes = dict(num_prototypes=num_prototypes, dim_hidden=dim_hidden, dim_out=dim_out)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        self.backbone = build_backbone(arch, pretrained)
        self.projector = Projector(self.backbone.out_channels, dim_hidden, dim_out)
        self.prototypes = nn.Embedding(num_prototypes, dim_out)

    def embed(self, images: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) normalized -> backbone map (b c h w), pixel embeddings (b d h w).

        features: the map, where it is known.
        """
        features = self.backbone(images) if features is None else features
        return features, self.projector(features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) normalized -> embeddings (b d h w), similarity (b k h w) in [-1, 1]."""
        embeddings = self.embed(images)[1]
        return embeddings, similarity(embeddings, self.prototypes.weight)
