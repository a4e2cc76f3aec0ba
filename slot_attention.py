"""Slots that compete for the pixels of one image, and queries that do not.

Slides: "On object discovery: the Slot Attention mechanism"; "Slot Attention works well on toy
data". Paper: Locatello et al., 2020, section 2. Differs: none known in the attention; not part of
SlotCon, here to be compared with it. Read next: losses.py, where the path goes on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from slots import EPSILON


class SlotAttention(nn.Module):
    """Slots compete for the pixels of one image, over and over (Locatello et al., 2020).

    dim: d of pixels and slots; num_slots: k; iterations: rounds of attention. Unlike prototypes,
    slots start from noise in every image, so that slot 3 of two images has nothing in common."""

    def __init__(self, dim: int, num_slots: int, iterations: int = 3, dim_hidden: int = 128):
        super().__init__()
        self.num_slots, self.iterations = num_slots, iterations
        self.mean, self.log_std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.norm_pixels, self.norm_slots, self.norm_mlp = (
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
        )
        self.to_query, self.to_key, self.to_value = (
            nn.Linear(dim, dim, bias=False) for _ in range(3)
        )
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim))

    def forward(self, pixels: Tensor, start: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """pixels (b n d); start (b k d) or None for noise -> slots (b k d), attention (b k n) of
        every iteration.

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
            state = self.gru(
                rearrange(update, "b k d -> (b k) d"), rearrange(slots, "b k d -> (b k) d")
            )
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
        self.to_query, self.to_key, self.to_value = (
            nn.Linear(dim, dim, bias=False) for _ in range(3)
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (b n d) -> slots (b k d), attention (b k n), which sums to 1 over n: pixels may
        stay unowned.
        """
        queries = self.to_query(self.queries).expand(len(pixels), -1, -1)
        attention = query_attention(queries, self.to_key(pixels), compete=False)
        return einsum(attention, self.to_value(pixels), "b k n, b n d -> b k d"), attention


def query_attention(
    queries: Tensor, keys: Tensor, compete: bool, temperature: float = 1.0
) -> Tensor:
    """The whole difference between the two slides is one `dim=`.

    queries (b k d), keys (b n d) -> (b k n): softmax of <q, k> / (sqrt(d) temperature) over k where
    the queries compete for pixels (Slot Attention), over n where each query is on its own
    (Transformer decoder)."""
    logits = einsum(queries, keys, "b k d, b n d -> b k n") / (
        queries.shape[-1] ** 0.5 * temperature
    )
    return logits.softmax(dim=1 if compete else 2)  # over k, or over n


def weighted_mean(attention: Tensor, values: Tensor) -> Tensor:
    """attention (b k n) >= 0, values (b n d) -> (b k d): each slot the mean of its pixels."""
    attention = F.normalize(attention + EPSILON, p=1, dim=2)  # over n
    return einsum(attention, values, "b k n, b n d -> b k d")
