"""Depth as the cue: slots of the image must paint how far everything is.

Slide: "And also on real-world data if motion or depth is available".
Paper: SAVi++ (Elsayed et al., NeurIPS 2022), section 3.
Differs: single images instead of video, and no hints where objects are in the first frame; the
depth is toy.py's order of drawing, dense, not the sparse points of a LiDAR. Only training uses the
depth: groups are found in images without it.
"""

from comparisons.slot_attention import Reconstruction


class Depth(Reconstruction):
    """slot_attention.py with depth as the target: 0 far and 1 near."""

    extra = "depth"
    channels = 1
