"""Pixels pool into slots, one feature vector per group; and the two attention mechanisms the slots descend from.

Slides: "Together: solving segmentation & representation jointly" (attentive pooling over the feature maps) and "On
object discovery: the Slot Attention mechanism". Paper: section 3.2.
Differs: the predictor sees only the rows it is given; `SlotAttention` and `IndependentQueries` are for comparison and
are not part of SlotCon.
Read next: losses.py.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

EPSILON = 1e-6  # [O] every pixel gives every slot at least this much, so that no slot divides by zero


def attentive_pooling(embeddings: Tensor, similarity: Tensor, temperature: float) -> Tensor:
    """One feature vector per prototype and image: the mean of the pixels, weighted by how much they belong.

    embeddings (b d h w) not normalised [O]; similarity (b k h w) in [-1, 1]; temperature: the teacher's, for student
    and teacher alike [O] -> slots (b k d). The maps are those of the whole view, not the aligned ones.
    a = softmax_k(similarity / temperature) + 1e-6; slot_k = sum_hw a_k z / sum_hw a_k.
    Raises ValueError for a temperature that is not positive or maps of different sizes.
    """
    if temperature <= 0:
        raise ValueError(f"the pooling temperature must be positive, found {temperature}")
    if embeddings.shape[-2:] != similarity.shape[-2:]:
        raise ValueError(f"embeddings {tuple(embeddings.shape)} and similarity {tuple(similarity.shape)} "
                         "are maps of different sizes")
    # A float32 island under mixed precision: a slot is a sum over all pixels.
    with torch.autocast(similarity.device.type, enabled=False):
        attention = (similarity / temperature).softmax(dim=1) + EPSILON  # over k
        attention = attention / reduce(attention, "b k h w -> b k 1 1", "sum")
        return einsum(attention, embeddings.to(attention.dtype), "b k h w, b d h w -> b k d")


@torch.no_grad()  # an argmax has no gradient; this only says so early
def occupied(similarity: Tensor) -> Tensor:
    """Which prototypes own at least one pixel of the view: the nearest one of some pixel.

    similarity (b k h w) raw: no temperature, no centre, for the teacher too [O] -> (b k) bool.
    """
    nearest = rearrange(similarity.argmax(dim=1), "b h w -> b (h w)")  # over k
    owned = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=similarity.device)
    return owned.scatter(1, nearest, True)


class SlotPredictor(nn.Module):
    """The student's extra MLP on its slots: d -> dim_hidden -> dim_hidden -> d, rows (n d) -> (n d).

    The projector's shape and start with linear layers [O]. It runs once per direction, on that direction's queries
    only, so its batch statistics are per direction.
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
        # A batch norm of its own has no statistics for fewer than two rows, which one of several CPU processes may be
        # left with; it then uses the running ones. Synchronised norms count the rows of all ranks.
        alone = not any(isinstance(layer, nn.SyncBatchNorm) for layer in self.mlp)
        if self.training and alone and len(slots) < 2:
            self.eval()
            predictions = self.mlp(slots)
            self.train()
            return predictions
        return self.mlp(slots)
