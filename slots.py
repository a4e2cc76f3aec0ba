"""Pixels pool into slots, one feature vector per group; and the two attention mechanisms the slots descend from.

Slides: "Together: solving segmentation & representation jointly" (attentive pooling over the feature maps) and "On
object discovery: the Slot Attention mechanism". Paper: section 3.2.
Differs: the predictor sees only the rows it is given; `SlotAttention` and `IndependentQueries` are for comparison and
are not part of SlotCon.
Read next: losses.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class SlotAttention(nn.Module):
    """Slots compete for the pixels of one image, over and over (Locatello et al., 2020).

    dim: d of pixels and slots; num_slots: k; iterations: rounds of attention. Unlike prototypes, slots start from
    noise in every image, so that slot 3 of two images has nothing in common.
    """

    def __init__(self, dim: int, num_slots: int, iterations: int = 3, dim_hidden: int = 128):
        super().__init__()
        self.num_slots, self.iterations = num_slots, iterations
        self.mean, self.log_std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.norm_pixels, self.norm_slots, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_query, self.to_key, self.to_value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim))

    def forward(self, pixels: Tensor, start: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """pixels (b n d); start (b k d) or None for noise -> slots (b k d), attention (b k n) of every iteration.

        Each attention sums to 1 over k: a pixel that one slot takes is lost to the others.
        """
        pixels = self.norm_pixels(pixels)
        keys, values = self.to_key(pixels), self.to_value(pixels)
        if start is None:
            noise = torch.randn(len(pixels), self.num_slots, pixels.shape[-1], device=pixels.device)
            start = self.mean + self.log_std.exp() * noise
        slots, history = start, []
        for _ in range(self.iterations):
            queries = self.to_query(self.norm_slots(slots))
            attention = query_attention(queries, keys, compete=True)
            history.append(attention)
            update = weighted_mean(attention, values)
            state = self.gru(rearrange(update, "b k d -> (b k) d"), rearrange(slots, "b k d -> (b k) d"))
            slots = rearrange(state, "(b k) d -> b k d", k=slots.shape[1])
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, history


class IndependentQueries(nn.Module):
    """Queries of a Transformer decoder: each looks wherever it likes, and none knows of the others.

    dim: d; num_slots: k learnt queries. One layer of cross-attention, without self-attention.
    """

    def __init__(self, dim: int, num_slots: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_slots, dim))
        self.to_query, self.to_key, self.to_value = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (b n d) -> slots (b k d), attention (b k n), which sums to 1 over n: pixels may stay unowned."""
        queries = self.to_query(self.queries).expand(len(pixels), -1, -1)
        attention = query_attention(queries, self.to_key(pixels), compete=False)
        return einsum(attention, self.to_value(pixels), "b k n, b n d -> b k d"), attention


def query_attention(queries: Tensor, keys: Tensor, compete: bool, temperature: float = 1.0) -> Tensor:
    """The whole difference between the two slides is one `dim=`.

    queries (b k d), keys (b n d) -> (b k n): softmax of <q, k> / (sqrt(d) temperature) over k where the queries
    compete for pixels (Slot Attention), over n where each query is on its own (Transformer decoder).
    """
    logits = einsum(queries, keys, "b k d, b n d -> b k n") / (queries.shape[-1] ** 0.5 * temperature)
    return logits.softmax(dim=1 if compete else 2)  # over k, or over n


def weighted_mean(attention: Tensor, values: Tensor) -> Tensor:
    """attention (b k n) >= 0, values (b n d) -> (b k d): every slot the mean of the pixels it won."""
    attention = F.normalize(attention + EPSILON, p=1, dim=2)  # over n
    return einsum(attention, values, "b k n, b n d -> b k d")
