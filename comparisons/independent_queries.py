"""The same encoder and decoder, but the queries do not compete: a decoder's cross-attention.

Slide: "On object discovery: the Slot Attention mechanism" ("Transformer decoders' queries are
independent to each other").
Papers: Locatello et al., NeurIPS 2020; DETR (Carion et al., ECCV 2020).
Differs: one layer of cross-attention without self-attention; the queries are learned, so each has a
name, but they are measured like the slots of slot_attention.py.
"""

from torch import nn

from comparisons.slot_attention import DIM, NUM_SLOTS, IndependentQueries, Reconstruction


class Independent(Reconstruction):
    """slot_attention.py with one module exchanged."""

    def make_slots(self) -> nn.Module:
        """Learned queries in place of slots."""
        return IndependentQueries(DIM, NUM_SLOTS)
