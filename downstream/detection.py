"""Table 2, COCO: Mask R-CNN with batch norms from torchvision's parts; average precision [O]."""

import contextlib
import copy
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as encoding
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.datasets import CocoDetection, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.models.detection import anchor_utils, faster_rcnn, mask_rcnn, rpn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as F

from downstream.annotations import read_annotations
from downstream.backbones import NEAREST, fitting, some_of
from downstream.settings import Detection
from engine.images import BadImage, Photograph
from engine.processes import Place
from engine.ranks import gather_objects
from measures.datasets import wrong_tree
from photometric import IMAGENET_MEAN, IMAGENET_STD

SCORE = "box_ap"  # decides which weights are the best
TREE = "{train2017,val2017}/*.jpg + annotations/instances_{train2017,val2017}.json"
PRECISION = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # COCOeval's first six
LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
WIDTH = 256  # of the pyramid and of the heads
Target = dict[str, Tensor]  # boxes, labels, masks of the objects of an image


def prepare(c: Detection, backbone: nn.Module) -> tuple[nn.Module, Sequence, Sequence]:
    """The model, what it learns from, and what it is tested on. Raises ValueError."""
    seen = CocoObjects(c.data_dir, "train")
    seen.ids = some_of([id for id in seen.ids if seen._load_target(id)], c)
    unseen = seen if c.test_on == "train" else CocoObjects(c.data_dir, "val")
    if seen.names != unseen.names:
        differ = sorted(f"{n} {name}" for n, name in seen.names.items() ^ unseen.names.items())
        found = f"the categories of train2017 and val2017 differ: {', '.join(differ[:6])}"
        raise ValueError(f"{found}; give both files all categories")
    labeled = wrap_dataset_for_transforms_v2(seen, ("boxes", "labels", "masks"))
    return Detector(backbone, len(seen.labels), c), labeled, unseen


class Detector(nn.Module):
    """Mask R-CNN on C2 .. C5 of a ResNet. classes: without the background."""

    losses = ("loss", *LOSSES)

    def __init__(self, backbone: nn.Module, classes: int, c: Detection):
        super().__init__()
        if not hasattr(backbone, "layer4"):
            found = f"a feature pyramid needs a ResNet's four stages, and {c.arch} is no ResNet"
            raise ValueError(f"{found}: give one, or pretrain one with --arch resnet18")
        norm, layers = nn.BatchNorm2d, {f"layer{i + 1}": str(i) for i in range(4)}
        widths = [backbone.out_channels // 2 ** (3 - i) for i in range(4)]
        sizes = [(c.smallest_anchor * 2**level,) for level in range(5)]  # P2 .. P6
        anchors = Anchors(sizes, [(0.5, 1.0, 2.0)] * len(sizes))
        boxes = faster_rcnn.FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [1024], norm)
        self.network = mask_rcnn.MaskRCNN(
            BackboneWithFPN(backbone, layers, widths, WIDTH, norm_layer=norm),
            classes + 1, c.test_short, c.longest, IMAGENET_MEAN, IMAGENET_STD,
            rpn_anchor_generator=anchors,
            rpn_head=rpn.RPNHead(WIDTH, anchors.num_anchors_per_location()[0], conv_depth=1),
            rpn_post_nms_top_n_train=1000,  # as detectron2
            box_head=boxes,
            mask_head=mask_rcnn.MaskRCNNHeads(WIDTH, [WIDTH] * 4, 1, norm),
            box_batch_size_per_image=c.regions,
            _skip_resize=True,
        )  # fmt: skip
        for part in (self.network.rpn, self.network.roi_heads):
            part.box_coder = Boxes(part.box_coder.weights)

    def forward(self, images: list[Tensor], targets: list[Target]) -> tuple[Tensor, Tensor]:
        """A batch of `view` -> the loss, and the numbers of `losses` (6) detached."""
        parts = self.network([image.float() / 255 for image in images], targets)
        losses = torch.stack([parts[name].float() for name in LOSSES])
        return losses.sum(), torch.cat([losses.sum()[None], losses]).detach()

    @torch.inference_mode()
    def predict(self, image: Tensor) -> Target:
        """image (3 y x) uint8 -> boxes (n 4) px, labels, scores (n), masks (n y x) bool."""
        found = self.network([image.float() / 255])[0]
        return {**found, "masks": found["masks"][:, 0] > 0.5}


class Anchors(anchor_utils.AnchorGenerator):
    """In float32 beside maps in half precision, in which a place is a multiple of 4 px."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of the maps, which is not used."""
        super().set_cell_anchors(torch.float32, device)


class Boxes(BoxCoder):
    """In float32, like the anchors: proposals, and so what is learned from them."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Codes (n 4 t) in any precision, of boxes (n 4) px -> boxes (n 4 t) px."""
        return super().decode_single(rel_codes.float(), boxes)


class CocoObjects(CocoDetection):
    """Pairs of an image (3 y x) uint8 and the annotations of its objects, with category_id 1..t.

    ids: of the images, in order; names: of the categories. Crowds are left out. Raises ValueError.
    """

    def __init__(self, data_dir: str, part: str):
        folder = Path(data_dir, f"{part}2017")
        file = Path(data_dir, "annotations", f"instances_{part}2017.json")
        for path in (file, folder):
            if not data_dir or not path.exists():
                raise wrong_tree("coco", Path(data_dir), f"no {path}", TREE)
        VisionDataset.__init__(self, folder)
        self.coco = COCO()
        self.coco.dataset = read_annotations(file)
        with contextlib.redirect_stdout(None):  # it reports its progress to stdout
            self.coco.createIndex()
        self.names = {number: str(each.get("name")) for number, each in self.coco.cats.items()}
        self.class_names = tuple(self.names.values())
        self.labels = {number: t for t, number in enumerate(sorted(self.coco.cats), 1)}
        self.ids = sorted(self.coco.imgs)

    @property
    def paths(self) -> list[str]:
        """Of the images, below their folder."""
        return [self.coco.imgs[id]["file_name"] for id in self.ids]

    def _load_image(self, id: int) -> Tensor:
        name, *size = (self.coco.imgs[id][key] for key in ("file_name", "height", "width"))
        try:
            image = Photograph(self.root / name, name).labeled()
        except BadImage as bad:
            raise ValueError(f"cannot read {bad}") from None
        if [*image.shape[1:]] != size:
            found = f"{name} is {image.shape[2]} x {image.shape[1]}"
            raise ValueError(f"{found}, but its annotations are of {size[1]} x {size[0]}")
        return image

    def _load_target(self, id: int) -> list[dict[str, Any]]:
        return [
            dict(a, category_id=self.labels[a["category_id"]], bbox=[*map(float, a["bbox"])])
            for a in self.coco.imgToAnns[id]
            if not a["iscrowd"]
        ]


def view(pair: tuple[Tensor, Target], rng: random.Random, c: Detection) -> tuple[Tensor, Target]:
    """What a step sees: a whole image at another size, mirrored half of the time.

    image (3 y x) uint8; boxes (n 4) float32 x1 y1 x2 y2 px, only those with an area inside the
    image; labels (n) int64; masks (n y x) uint8.
    """
    image, target = pair
    short = rng.choice(range(c.shorts[1], c.shorts[0] + 1, 32))
    size = fitting(image.shape[-2:], c.longest, short)
    boxes = F.resize(F.clamp_bounding_boxes(target["boxes"]), size)
    masks = F.resize(target["masks"].as_subclass(Tensor), size, NEAREST)
    parts = [F.resize(image, size), boxes, masks]
    image, boxes, masks = map(F.horizontal_flip, parts) if rng.random() < 0.5 else parts
    boxes, valid = F.sanitize_bounding_boxes(boxes, min_size=1e-2, min_area=0)
    labels = target["labels"][valid]
    return image, dict(boxes=boxes.as_subclass(Tensor), labels=labels, masks=masks[valid])


def collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list, list]:
    """A batch of images of unlike sizes: lists instead of tensors."""
    return tuple(map(list, zip(*samples)))


def scores(
    model: Detector, data: CocoObjects, items: Iterable[tuple[int, Any]], place: Place
) -> dict[str, Any]:
    """COCO's box_ap, box_ap50 ... mask_ap_large of all ranks in [0, 1]; None without an object.

    items: this rank's `share`. The main process alone computes; for the others scores are zero.
    """
    own: list[dict[str, Any]] = []
    for index, (image, _) in items:
        found = model.predict(image.to(place.device))
        own += as_results(found, data.ids[index], list(data.labels))
    results = [result for part in gather_objects(own) for result in part]
    numbers: dict[str, Any] = {}
    with contextlib.redirect_stdout(None):  # pycocotools prints its tables to stdout
        truth = copy.deepcopy(data.coco)  # the judge writes into it
        found = truth.loadRes(results) if results and place.rank == 0 else None
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            judge = COCOeval(truth, found, kind)
            judge.params.imgIds, judge.stats = data.ids, [0.0] * len(PRECISION)
            for act in (judge.evaluate, judge.accumulate, judge.summarize) if found else ():
                act()
            for key, value in zip(PRECISION, judge.stats):
                numbers[f"{name}_{key}"] = None if value < 0 else float(value)
    return dict(numbers, detections=len(results))


def as_results(found: Target, image_id: int, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Detections in one image as COCO's results. categories: category_id of label 1, 2 ..."""
    boxes = box_convert(found["boxes"].float().cpu(), "xyxy", "xywh").tolist()
    masks = np.asfortranarray(found["masks"].permute(1, 2, 0).cpu().numpy().astype(np.uint8))
    ids = [categories[label - 1] for label in found["labels"].tolist()]
    about = zip(ids, boxes, found["scores"].tolist(), encoding.encode(masks))
    names = "category_id", "bbox", "score", "segmentation"
    return [dict(zip(names, each), image_id=image_id) for each in about]
