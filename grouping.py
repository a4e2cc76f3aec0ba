"""Every pixel is assigned to the prototypes that it resembles: pixel-level deep clustering.

Slide: "Semantic grouping with pixel-level deep clustering".
Paper: section 3.1.
Read next: slots.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torchvision.ops import roi_align

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
    """Undo crop and flip, so that position (h, w) is the same place of the scene in both views.

    maps (b c h w): similarity or embeddings of one view; boxes (b 4), flipped (b) bool: of this
    view, as in `data.Batch` -> (b c h w): the part inside the box, at the size of the map, not
    mirrored; any values for an empty box. Raises ValueError where the three disagree on b.
    """
    b, _, h, w = maps.shape
    if boxes.shape != (b, 4) or flipped.shape != (b,):
        raise ValueError(f"{b} maps, but boxes {tuple(boxes.shape)}, flags {tuple(flipped.shape)}")
    maps = full_precision(maps)  # bfloat16 could not count the images beyond 256
    x1, y1, x2, y2 = boxes.to(maps.dtype).unbind(dim=1)
    image = torch.arange(b, device=maps.device, dtype=maps.dtype)
    regions = torch.stack([image, x1 * w, y1 * h, x2 * w, y2 * h], dim=1)
    # aligned=True: pixel centers are half-integers. Otherwise maps move by half a pixel.
    aligned = roi_align(maps, regions, (h, w), aligned=True)
    return torch.where(rearrange(flipped, "b -> b 1 1 1"), aligned.flip(-1), aligned)  # over w


class GroupingNetwork(nn.Module):
    """Backbone, projector and prototypes: the part of the student that has a teacher.

    arch: of `backbone.ARCHITECTURES`; num_prototypes: k; dim_hidden: of the projector; dim_out: d.
    Prototypes start from N(0, 1) [O]. Raises ValueError for a size below 1.
    """

    def __init__(self, arch: str, num_prototypes: int, dim_hidden: int = 4096, dim_out: int = 256):
        super().__init__()
        sizes = dict(num_prototypes=num_prototypes, dim_hidden=dim_hidden, dim_out=dim_out)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, found {size}")
        self.backbone = build_backbone(arch)
        self.projector = Projector(self.backbone.out_channels, dim_hidden, dim_out)
        self.prototypes = nn.Embedding(num_prototypes, dim_out)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) normalized -> backbone map (b c h w), pixel embeddings (b d h w)."""
        features = self.backbone(images)
        return features, self.projector(features)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) normalized -> embeddings (b d h w), similarity (b k h w) in [-1, 1]."""
        embeddings = self.embed(images)[1]
        return embeddings, similarity(embeddings, self.prototypes.weight)
