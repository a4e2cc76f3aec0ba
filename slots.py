"""Pixels pool into slots: one feature vector per prototype and image.

Slide: "Together: solving segmentation & representation jointly" (attentive pooling over the feature
maps).
Paper: section 3.2.
Differs: the predictor is given only the rows that it must predict.
Read next: losses.py. Side trip: slot_attention.py, the mechanism from which the name comes.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from grouping import assignment

EPSILON = 1e-6  # [O] the least weight of a pixel in a slot, so that no slot divides by zero


def attentive_pooling(embeddings: Tensor, similarity: Tensor, temperature: float) -> Tensor:
    """One feature vector per prototype and image: the mean of its pixels, weighted by their
    assignment.

    embeddings (b d h w) not normalized [O]; similarity (b k h w) in [-1, 1]; temperature: the
    teacher's, for student and teacher alike [O] -> slots (b k d). The maps are those of the whole
    view, not the aligned ones. a = softmax_k(similarity / temperature) + 1e-6; slot_k = sum_hw a_k
    z / sum_hw a_k. Raises ValueError for a temperature that is not positive or maps of different
    sizes.
    """
    if embeddings.shape[-2:] != similarity.shape[-2:]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} and similarity {tuple(similarity.shape)} "
            "are maps of different sizes"
        )
    # In float32 under mixed precision too: a slot is a sum over all pixels.
    with torch.autocast(similarity.device.type, enabled=False):
        attention = assignment(similarity, temperature) + EPSILON
        attention = attention / reduce(attention, "b k h w -> b k 1 1", "sum")
        return einsum(attention, embeddings.to(attention.dtype), "b k h w, b d h w -> b k d")


@torch.no_grad()
def occupied(similarity: Tensor) -> Tensor:
    """Which slots are occupied: the prototype is the nearest one of at least one pixel. The slides
    say "active".

    similarity (b k h w) raw: no temperature, no center, for the teacher too [O] -> (b k) bool.
    """
    nearest = rearrange(similarity.argmax(dim=1), "b h w -> b (h w)")  # over k
    owned = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=similarity.device)
    return owned.scatter(1, nearest, True)


class SlotPredictor(nn.Module):
    """The student's extra MLP on its slots: d -> dim_hidden -> dim_hidden -> d, rows (n d) -> (n
    d).

    The projector's shape and start with linear layers [O]. It runs once per direction, on that
    direction's queries only, so its batch statistics are per direction.
    """

    def __init__(self, dim_in: int, dim_out: int, dim_hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim_in, dim_hidden),
            nn.BatchNorm1d(dim_hidden),
            nn.GELU(),
            nn.Linear(dim_hidden, dim_hidden),
            nn.BatchNorm1d(dim_hidden),
            nn.GELU(),
            nn.Linear(dim_hidden, dim_out),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, slots: Tensor) -> Tensor:
        """slots (n dim_in) -> predictions (n dim_out), not normalized."""
        # A batch norm of its own has no statistics for fewer than two rows, which one of several
        # CPU processes may be left with; it then uses the running ones. Synchronized norms count
        # the rows of all ranks.
        alone = not any(isinstance(layer, nn.SyncBatchNorm) for layer in self.mlp)
        if self.training and alone and len(slots) < 2:
            self.eval()
            predictions = self.mlp(slots)
            self.train()
            return predictions
        return self.mlp(slots)
