"""Mask R-CNN with a feature pyramid, from torchvision's parts: boxes and masks of COCO's objects.

Slides: tables 2 and 7. Paper: section 4.2, which used detectron2's Mask R-CNN R50-FPN.
Differs: torchvision's `maskrcnn_resnet50_fpn` freezes batch norms and stages and has another box
head. Here, as in the released settings [O]: a batch norm after every convolution of trunk, pyramid,
box head and mask head, and nothing frozen. torchvision's RoIAlign samples 2 x 2 points per cell,
detectron2's as many as there are pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead

from photometric import IMAGENET_MEAN, IMAGENET_STD

PARTS = (
    "loss_classifier",
    "loss_box_reg",
    "loss_mask",
    "loss_objectness",
    "loss_rpn_box_reg",
)  # torchvision's
LOSSES = ("loss", "class_loss", "box_loss", "mask_loss", "proposal_loss", "proposal_box_loss")
WIDTH = 256  # of the pyramid and of the heads


def mask_rcnn(
    trunk: nn.Module,
    classes: int,
    test_short: int = 800,
    longest: int = 1333,
    smallest_anchor: int = 32,
    regions: int = 512,
) -> MaskRCNN:
    """Mask R-CNN on C2 .. C5 of a ResNet trunk.

    classes: without the background; test_short, longest: px of an image when it is tested, training
    images come at their size; smallest_anchor: px, of the finest of five levels, each of which
    doubles it; regions: proposals per image that the heads learn from. Raises ValueError for a
    trunk without stages.
    """
    if not hasattr(trunk, "layer4"):
        raise ValueError("a feature pyramid needs the four stages of a ResNet")
    norm = nn.BatchNorm2d
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    widths = [trunk.out_channels // 2 ** (3 - i) for i in range(4)]
    pyramid = BackboneWithFPN(
        trunk, layers, widths, WIDTH, norm_layer=norm
    )  # and P6, every second cell of P5
    sizes = tuple((smallest_anchor * 2**level,) for level in range(5))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return MaskRCNN(
        pyramid,
        classes + 1,
        test_short,
        longest,
        IMAGENET_MEAN,
        IMAGENET_STD,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(WIDTH, anchors.num_anchors_per_location()[0], conv_depth=1),
        rpn_post_nms_top_n_train=1000,  # as detectron2
        box_head=FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [1024], norm_layer=norm),
        mask_head=MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1, norm_layer=norm),
        box_batch_size_per_image=regions,
        _skip_resize=True,
    )


class Detector(nn.Module):
    """Mask R-CNN as a run trains it: a batch in, one loss out."""

    def __init__(self, network: MaskRCNN):
        super().__init__()
        self.network = network

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """images (3 y x) uint8 of any sizes; targets: boxes (n 4) float px, labels (n) 1..t, masks
        (n y x) uint8.

        Returns the loss, and LOSSES (6) detached.
        """
        parts = self.network([image.float() / 255 for image in images], list(targets))
        losses = torch.stack([parts[name].float() for name in PARTS])
        return losses.sum(), torch.cat([losses.sum()[None], losses]).detach()

    @torch.inference_mode()
    def predict(self, image: Tensor) -> dict[str, Tensor]:
        """image (3 y x) uint8 -> boxes (n 4) px, labels (n), scores (n) in [0, 1], masks (n y x)
        bool."""
        found = self.network([image.float() / 255])[0]
        return {**found, "masks": found["masks"][:, 0] > 0.5}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, everything that is trained: with decay, and the batch norms' scales and shifts
    without [O]."""
    norms = {p for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    trained: Iterable[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return [
        dict(params=[p for p in trained if p not in norms], weight_decay=weight_decay),
        dict(params=[p for p in trained if p in norms], weight_decay=0.0),
    ]


def is_norm(module: nn.Module) -> bool:
    """A batch norm, synchronized or not."""
    return isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))
