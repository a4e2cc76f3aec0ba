"""Depth as the cue: slots that must paint how far everything is find what is equally far.

Slide: "And also on real-world data if motion or depth is available".
Paper: SAVi++ (Elsayed et al., NeurIPS 2022), section 3.
Differs: single images instead of video, and no hints where objects are in the first frame; the
depth is toy.py's order of drawing, dense, not the sparse points of a LiDAR; and the network sees
the depth itself, as motion.py sees flow, where SAVi++ sees the video and only paints the depth.
"""

from types import MappingProxyType

from comparisons.slot_attention import Reconstruction


class Depth(Reconstruction):
    """slot_attention.py on depth, painted from blue, which is far, to red, which is near."""

    sees = "depth"
    # At three times the rate, that of flow and plain colors, some runs find nothing [U]
    changes = MappingProxyType({**Reconstruction.changes, "base_lr": 0.016})
