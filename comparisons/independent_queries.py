"""The same encoder and decoder, but the queries do not compete: a decoder's cross-attention.

Slide: "On object discovery: the Slot Attention mechanism" ("Transformer decoders' queries are
independent to each other").
Papers: Locatello et al., NeurIPS 2020; DETR (Carion et al., ECCV 2020).
Differs: one layer of cross-attention without self-attention; the queries are learned, so each has a
name, but they are measured like the slots of slot_attention.py. Groups are the decoder's masks: the
queries do not compete for pixels, so none is won.
"""

from einops import rearrange
from torch import Tensor, nn

from comparisons.slot_attention import DIM, NUM_SLOTS, IndependentQueries, Reconstruction


class Independent(Reconstruction):
    """slot_attention.py with one module exchanged."""

    def make_slots(self) -> nn.Module:
        """Learned queries in place of slots."""
        return IndependentQueries(DIM, NUM_SLOTS)

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> the decoder's masks (b k y/2 x/2)."""
        return rearrange(self.paint(images)[1], "b k (y x) -> b k y x", y=images.shape[2] // 2)
