"""The same encoder and decoder, but the queries do not compete: a decoder's cross-attention.

Slide: "On object discovery: the Slot Attention mechanism" ("Transformer decoders' queries are
independent to each other"). Papers: Locatello et al., 2020; DETR (Carion et al., ECCV 2020).
Differs: one layer of cross-attention without self-attention; the queries are learned, so each has a
name, yet they are measured as the slots of slot_attention.py are.
Read next: motion.py.
"""

from __future__ import annotations

from torch import nn

from comparisons.slot_attention import NUM_SLOTS, Reconstruction
from slot_attention import IndependentQueries


class Independent(Reconstruction):
    """slot_attention.py with one module exchanged."""

    def make_slots(self, dim: int) -> nn.Module:
        """Learned queries in place of slots."""
        return IndependentQueries(dim, NUM_SLOTS)
