"""Every pixel is assigned to the prototypes that it resembles: pixel-level deep clustering, and its
geometry.

Slide: "Semantic grouping with pixel-level deep clustering".
Paper: section 3.1.
Differs: the similarity is computed in float32 under mixed precision (the released code leaves it to
autocast); the flip back is one vectorised selection instead of a loop over images; crops that do
not overlap give an empty box, never an inverted one.
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
    """float16 and bfloat16 become float32; float32 and float64 stay: softmaxes over many rows need
    the digits.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine between every prototype and every pixel embedding.

    embeddings (b d h w), prototypes (k d), neither normalized -> (b k h w) in [-1, 1].
    similarity[b,k,h,w] = <p_k, z_bhw> / (|p_k| |z_bhw|). Slide: "similar assignment scores w.r.t.
    the same set of cluster centers (prototypes)".
    """
    # In float32: half precision resolves a cosine to 1/256 only, which temperature 0.07 turns into
    # 6 %.
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(full_precision(embeddings), dim=1)  # over d
        p = F.normalize(full_precision(prototypes), dim=1)  # over d
        return einsum(p, z, "k d, b d h w -> b k h w")


def assignment(similarity: Tensor, temperature: float) -> Tensor:
    """Soft assignment of every pixel to the prototypes: softmax over k of similarity / temperature.

    similarity (b k h w) -> (b k h w), positive, summing to 1 over k. Student temperature 0.1,
    teacher 0.07 [P].
    """
    if temperature <= 0:
        raise ValueError(f"the temperature of an assignment must be positive, found {temperature}")
    return (similarity / temperature).softmax(dim=1)  # over k


def inverse_augmentation(maps: Tensor, boxes: Tensor, flipped: Tensor) -> Tensor:
    """Undo crop and flip: cut the part both views share out of each map, at the map's own size,
    unmirrored.

    maps (b c h w) similarities or embeddings of one view; boxes (b 4) the overlap as x1 y1 x2 y2 in
    the view's own unit frame, mirrored like the view; flipped (b) bool -> (b c h w), where position
    (h, w) is the same place of the scene in both views. An empty box (0 0 0 0) gives values that
    the consistency loss leaves out. Slide: "pixels that lie in the same location should have
    similar assignment scores". Paper: section 3.1. Raises ValueError where the three disagree on b.
    """
    b, _, h, w = maps.shape
    if boxes.shape != (b, 4) or flipped.shape != (b,):
        raise ValueError(
            f"{b} maps need boxes ({b}, 4) and flags ({b},), found {tuple(boxes.shape)} and "
            f"{tuple(flipped.shape)}"
        )
    # The boxes take the maps' type, and bfloat16 cannot count images beyond 256
    maps = full_precision(maps)
    x1, y1, x2, y2 = boxes.to(maps.dtype).unbind(dim=1)
    image = torch.arange(b, device=maps.device, dtype=maps.dtype)
    regions = torch.stack([image, x1 * w, y1 * h, x2 * w, y2 * h], dim=1)
    # aligned=True puts pixel centers at half-integers; without it every map moves by about half a
    # pixel.
    aligned = roi_align(maps, regions, (h, w), aligned=True)
    return torch.where(rearrange(flipped, "b -> b 1 1 1"), aligned.flip(-1), aligned)  # over w


class GroupingNetwork(nn.Module):
    """Backbone, projector and prototypes: the part of the student that has a teacher, and that is
    evaluated.

    arch: a name of `backbone.ARCHITECTURES`; num_prototypes: k; dim_hidden: width of the projector;
    dim_out: d. Prototypes start from N(0, 1) [O]. Raises ValueError for a size below 1.
    """

    def __init__(self, arch: str, num_prototypes: int, dim_hidden: int = 4096, dim_out: int = 256):
        super().__init__()
        for name, size in dict(
            num_prototypes=num_prototypes, dim_hidden=dim_hidden, dim_out=dim_out
        ).items():
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
        _, embeddings = self.embed(images)
        return embeddings, similarity(embeddings, self.prototypes.weight)
