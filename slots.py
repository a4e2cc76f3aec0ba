"""Pixels pool into slots: one feature vector per prototype and image.

Slide: "Together: solving segmentation & representation jointly" (attentive pooling over the feature
maps).
Paper: section 3.2.
Read next: losses.py.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from backbone import three_layers
from grouping import assignment

EPSILON = 1e-6  # [O] the least weight of a pixel in a slot, so that no slot divides by zero


def attentive_pooling(embeddings: Tensor, similarity: Tensor, temperature: float) -> Tensor:
    """A slot is the mean of all pixels, weighted by their assignment to its prototype.

    a = softmax_k(similarity / temperature) + 1e-6
    slot_k = sum_hw a_k z / sum_hw a_k

    embeddings z (b d h w), not normalized [O]; similarity (b k h w), both of the whole view;
    temperature: the teacher's, for student and teacher alike [O] -> slots (b k d). Raises
    ValueError for a temperature that is not positive, and for maps of different sizes.
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
    """A slot is occupied if its prototype is the nearest one of some pixel (slides: "active").

    similarity (b k h w), without temperature and center, also the teacher's [O] -> (b k) bool.
    """
    nearest = rearrange(similarity.argmax(dim=1), "b h w -> b (h w)")  # over k
    owned = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=similarity.device)
    return owned.scatter(1, nearest, True)


class SlotPredictor(nn.Module):
    """The student's three linear layers on slots: rows (n dim_in) -> (n dim_out) [O].

    It runs once per direction, on the queries of that direction, which its batch norms count.
    """

    def __init__(self, dim_in: int, dim_out: int, dim_hidden: int):
        super().__init__()
        self.mlp = three_layers(nn.Linear, nn.BatchNorm1d, (dim_in, dim_hidden, dim_out))

    def forward(self, slots: Tensor) -> Tensor:
        """slots (n dim_in) -> predictions (n dim_out), not normalized."""
        # One of several CPU processes may hold fewer than two rows, too few for a batch norm: it
        # uses the running statistics. Synchronized norms count the rows of all ranks.
        alone = any(isinstance(layer, nn.BatchNorm1d) for layer in self.mlp)
        if self.training and alone and len(slots) < 2:
            self.eval()
            predictions = self.mlp(slots)
            self.train()
            return predictions
        if not len(slots):  # torch's SyncBatchNorm sends zeros of this type, the others float32
            with torch.autocast(slots.device.type, enabled=False):
                return self.mlp(slots)
        return self.mlp(slots)
