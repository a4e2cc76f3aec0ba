"""downstream/: strides, dilations, heads, norms and rates are those of the settings."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection.image_list import ImageList

from backbone import build_backbone
from downstream.backbones import dilate, fitting, groups_of
from downstream.detection import Detector
from downstream.segmentation import Segmenter, pixel_loss, slide
from downstream.settings import PRESETS
from engine.norms import SyncedNorm, converted
from measures.metrics import IGNORE

COCO, FCN = PRESETS["detection"]["coco"], PRESETS["segmentation"]
SMALL = replace(
    FCN["ade20k"], head_width=8, frame=(0, 0), output_stride=0, head_concat=False, aux_weight=0.0
)


def segmenter(dataset, classes):
    """The released network of a data set, on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Segmenter(build_backbone("resnet50"), classes, FCN[dataset])


@pytest.fixture(scope="module")
def detector():
    with torch.device("meta"):
        return Detector(build_backbone("resnet50"), 80, COCO)


def shapes(module):
    """(in, out, kernel, dilation) of every convolution."""
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    return [(c.in_channels, c.out_channels, c.kernel_size[0], c.dilation[0]) for c in convs]


@pytest.mark.parametrize("dataset, classes", [("voc", 21), ("cityscapes", 19)])
def test_voc_and_cityscapes_have_stride_16_and_two_convolutions_of_dilation_6(dataset, classes):
    network = segmenter(dataset, classes)
    maps = network.backbone(torch.zeros(1, 3, 160, 192, device="meta"))
    assert maps.shape == (1, 2048, 10, 12)
    assert shapes(network.head) == [(2048, 256, 3, 6), (256, 256, 3, 6), (256, classes, 1, 1)]
    assert network.head(maps).shape == (1, classes, 10, 12)
    assert network.head.dropout.p == 0 and network.losses == ("loss",)


def test_ade20k_has_stride_8_a_head_that_joins_its_input_and_an_auxiliary_one():
    network = segmenter("ade20k", 150)
    maps = network.backbone(torch.zeros(1, 3, 160, 192, device="meta"))
    assert maps["aux"].shape == (1, 1024, 20, 24) and maps["out"].shape == (1, 2048, 20, 24)
    wide = (512, 512, 3, 1)
    assert shapes(network.head) == [(2048, *wide[1:]), wide, (2560, *wide[1:]), (512, 150, 1, 1)]
    assert shapes(network.aux_head) == [(1024, 256, 3, 1), (256, 150, 1, 1)]
    assert network.head.dropout.p == network.aux_head.dropout.p == 0.1


@pytest.mark.parametrize("stride, replaced", [(16, (False, False, True)), (8, (False, True, True))])
def test_a_dilated_backbone_is_torchvisions_own(stride, replaced):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=replaced)
    ours = build_backbone("resnet50")
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    dilate(ours, stride)
    stages = torchvision.models._utils.IntermediateLayerGetter(theirs.eval(), {"layer4": "out"})
    image = torch.rand(1, 3, 49, 65)
    assert torch.equal(ours.eval()(image), stages(image)["out"]) and ours.stride == stride
    dilations = [c for _, _, kernel, c in shapes(ours.layer4) if kernel == 3]
    assert dilations == {16: [1, 2, 2], 8: [2, 4, 4]}[stride]


def with_open_norms(network):
    """Norms that start at zero hide the rest of their block."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    return network


def test_every_weight_of_a_segmenter_learns_and_the_loss_adds_up():
    c = replace(FCN["ade20k"], head_width=8)
    network = with_open_norms(Segmenter(build_backbone("resnet18"), 5, c))
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    loss, numbers = network(images, torch.randint(0, 5, (2, 40, 48)))
    loss.backward()
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in network.parameters())
    torch.testing.assert_close(numbers[0], numbers[1] + 0.4 * numbers[2])
    assert numbers[0] == loss and not numbers.requires_grad and len(numbers) == len(network.losses)


def test_the_loss_is_a_mean_over_all_pixels_of_which_those_without_a_label_are_zero():
    scores, labels = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 6, 8))
    labels[0, :2] = IGNORE
    large = F.interpolate(scores, (6, 8), mode="bilinear", align_corners=False).log_softmax(1)
    there = (labels < 5).nonzero().tolist()
    total = -sum(large[b, labels[b, y, x], y, x].item() for b, y, x in there)
    torch.testing.assert_close(pixel_loss(scores, labels).item(), total / (2 * 6 * 8))
    assert pixel_loss(scores, torch.full((2, 6, 8), IGNORE)) == 0


def test_scores_of_overlapping_squares_are_averaged():
    class MeanColor:
        classes = 1

        def scores(self, images):
            return images.mean(dim=(1, 2, 3), keepdim=True).expand(-1, 1, *images.shape[-2:])

    images, sums, counts = torch.rand(1, 3, 8, 9), torch.zeros(8, 9), torch.zeros(8, 9)
    for top, left in itertools.product((0, 3, 4), (0, 3, 5)):
        square = slice(top, top + 4), slice(left, left + 4)
        sums[square] += images[0].mean(0)[square].mean()
        counts[square] += 1
    found = slide(MeanColor(), images, window=4, stride=3)
    torch.testing.assert_close(found[0, 0], sums / counts)


def test_a_prediction_has_the_size_of_its_image_whatever_it_was_read_at():
    network = Segmenter(build_backbone("tiny"), 3, replace(SMALL, head_convs=0, head_width=64))
    nn.init.normal_(network.eval().head.scores.weight)
    image = torch.randint(0, 256, (3, 21, 34), dtype=torch.uint8)
    found = {}
    for name, options in dict(whole={}, frame=dict(frame=(64, 48)), one=dict(window=(40, 40)),
                              squares=dict(window=(16, 8))).items():  # fmt: skip
        network.c = replace(SMALL, **options)
        found[name] = network.predict(image)
        assert found[name].shape == (21, 34)
    assert found["whole"].unique().numel() > 1 and torch.equal(found["one"], found["whole"])
    assert torch.equal(found["whole"], network.scores(image[None])[0].argmax(0))


@pytest.mark.parametrize("size, frame, expected", [
    ((1024, 2048), (2049, 1025), [1025, 2049]),  # Cityscapes: the long side decides
    ((375, 500), (2049, 513), [513, 684]),  # VOC: the short side decides
    ((500, 375), (2049, 513), [684, 513]),
    ((100, 800), (2048, 512), [256, 2048]),
    ((480, 640), (1333, 800), [800, 1067]),  # COCO
])  # fmt: skip
def test_an_image_is_fitted_into_a_frame_either_way_round(size, frame, expected):
    assert fitting(size, *frame) == expected


def test_pyramid_and_heads_have_the_layers_of_the_table(detector):
    network = detector.network
    fpn, heads = network.backbone.fpn, network.roi_heads
    wide = (256, 256, 3, 1)
    assert shapes(fpn.inner_blocks) == [(c, 256, 1, 1) for c in (256, 512, 1024, 2048)]
    assert shapes(fpn.layer_blocks) == shapes(heads.box_head) == 4 * [wide]
    assert shapes(heads.mask_head) == 4 * [wide]
    linear = [m for m in heads.box_head.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(256 * 7 * 7, 1024)]
    assert shapes(network.rpn.head) == [wide, (256, 3, 1, 1), (256, 12, 1, 1)]
    assert heads.box_predictor.cls_score.out_features == 81
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 81
    assert network.rpn.anchor_generator.sizes == [(32,), (64,), (128,), (256,), (512,)]
    assert heads.fg_bg_sampler.batch_size_per_image == 512
    assert network.transform.min_size == (800,) and network.transform.max_size == 1333


def test_norms_stand_where_they_should_become_synchronized_and_are_not_decayed(detector):
    with torch.device("meta"):
        other = Detector(build_backbone("resnet50"), 80, COCO)
        synchronized = converted(other, SyncedNorm)
    for model, kind in ((detector, nn.BatchNorm2d), (synchronized, nn.SyncBatchNorm)):
        norms = {f"{name}.{part}" for name, m in model.named_modules() if isinstance(m, kind)
                 for part in ("weight", "bias")}  # fmt: skip
        assert len(norms) == 2 * (53 + 8 + 4 + 4)  # backbone, pyramid, box and mask head
        decayed, free = groups_of(model, COCO)
        assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0)
        names = {p: name for name, p in model.named_parameters()}
        assert {names[p] for p in free["params"]} == norms
        assert len(decayed["params"]) + len(norms) == len(names)
    assert not groups_of(segmenter("voc", 21), FCN["voc"])[1]["params"]


def test_every_weight_of_a_detector_learns_from_one_object():
    with pytest.raises(ValueError, match="a ResNet's four stages, and tiny is no ResNet"):
        Detector(build_backbone("tiny"), 3, replace(COCO, arch="tiny"))
    c = replace(COCO, smallest_anchor=8, regions=8)
    detector = with_open_norms(Detector(build_backbone("resnet18"), 3, c))
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 1
    boxes = torch.tensor([[16.0, 16, 48, 48]])
    target = dict(boxes=boxes, labels=torch.tensor([1]), masks=masks)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    loss, numbers = detector([image, image.flip(-1)], [target, target])
    loss.backward()
    torch.testing.assert_close(numbers[0], numbers[1:].sum())
    assert not [name for name, p in detector.named_parameters() if p.grad is None]
    assert numbers.isfinite().all() and len(numbers) == len(detector.losses) == 6


def test_mixed_precision_moves_no_box_that_a_detector_learns():
    """Codes of zero in bf16 give the anchors back, to a part of a pixel."""
    network = Detector(build_backbone("resnet18"), 3, COCO).network
    images = ImageList(torch.zeros(1, 3, 640, 960), [(640, 960)])
    maps = [torch.zeros(1, 1, 640 // s, 960 // s) for s in (4, 8, 16, 32, 64)]
    [exact] = network.rpn.anchor_generator(images, maps)
    [anchors] = network.rpn.anchor_generator(images, [each.bfloat16() for each in maps])
    assert torch.equal(anchors, exact)
    for part in (network.rpn, network.roi_heads):
        found = part.box_coder.decode(torch.zeros(len(exact), 4).bfloat16(), [exact])[:, 0]
        assert (found - exact).abs().max() < 0.2


@pytest.mark.parametrize("c, steps, rates", [
    (COCO, 90_000, {0: 0.02 / 1000, 500: 0.02 * (0.001 + 0.999 / 2), 1000: 0.02, 59_999: 0.02,
                    60_000: 0.002, 79_999: 0.002, 80_000: 0.0002}),
    (FCN["voc"], 30_000, {0: 0.003, 20_999: 0.003, 21_000: 0.0003, 27_000: 0.00003}),
    (FCN["cityscapes"], 90_000, {0: 0.01, 62_999: 0.01, 63_000: 0.001, 81_000: 0.0001}),
    (FCN["ade20k"], 80_000, {0: 0.01, 40_000: 1e-4 + 0.0099 * 0.5**0.9, 80_000: 1e-4}),
    (replace(COCO, batch_size=8), 180_000, {1000: 0.01, 119_999: 0.01, 120_000: 0.001}),
])  # fmt: skip
def test_the_rate_is_that_of_the_table(c, steps, rates):
    assert c.total_steps == c.last_step == steps and replace(c, max_steps=7).last_step == 7
    for step, rate in rates.items():
        assert c.learning_rate(step) == pytest.approx(rate)


def test_the_settings_are_those_of_the_slides_tables():
    assert (COCO.batch_size, COCO.weight_decay, COCO.shorts, COCO.longest, COCO.test_short) == (
        16, 1e-4, (800, 640), 1333, 800)  # fmt: skip
    expected = {  # frame, crop, window, distort, weight decay
        "voc": ((2049, 513), 513, (0, 0), False, 1e-4),
        "cityscapes": ((2049, 1025), 769, (769, 513), False, 1e-4),
        "ade20k": ((2048, 512), 512, (0, 0), True, 5e-4),
    }
    for dataset, values in expected.items():
        c = FCN[dataset]
        assert (c.frame, c.crop, c.window, c.distort, c.weight_decay) == values
        assert (c.scale, c.batch_size, c.train_list) == ((0.5, 2.0), 16, "train_aug")
