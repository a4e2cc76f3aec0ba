"""The networks of a fine-tuning are those of the settings: strides, dilations, heads, norms.

downstream/segmentation.py, detection.py, trunks.py, schedules.py. Large networks are looked at on
the meta device, which has names and shapes but no memory.
"""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from backbone import build_trunk
from downstream import settings
from downstream.detection import Detector, mask_rcnn, parameter_groups
from downstream.detectron2_names import to_detectron2
from downstream.schedules import FineTuning
from downstream.segmentation import FCNHead, Segmenter, fitting, pixel_loss, places, predict, slide
from downstream.trunks import dilate, open_trunk
from downstream.views import black_objects
from engine.weights import start_from
from measures.metrics import IGNORE
from slotcon import SlotCon

# ------------------------------------------------------------------------ segmentation


def segmenter(dataset, arch="resnet50"):
    """The released network of a data set, without memory."""
    c = settings.SEGMENTATION[dataset]
    with torch.device("meta"):
        return Segmenter(
            build_trunk(arch), {"voc": 21, "cityscapes": 19, "ade20k": 150}[dataset],
            c.output_stride, c.head_width, c.head_convs, c.head_dilation, c.head_concat, c.dropout,
            c.aux_weight,
        )  # fmt: skip


def convs(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def shapes(module):
    """(in, out, kernel, dilation) of every convolution."""
    return [(c.in_channels, c.out_channels, c.kernel_size[0], c.dilation[0]) for c in convs(module)]


@pytest.mark.parametrize("dataset, classes", [("voc", 21), ("cityscapes", 19)])
def test_voc_and_cityscapes_have_stride_16_and_two_convolutions_of_dilation_6(dataset, classes):
    network = segmenter(dataset)
    maps = network.backbone(torch.zeros(1, 3, 160, 192, device="meta"))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {"out": (1, 2048, 10, 12)}
    assert shapes(network.head) == [(2048, 256, 3, 6), (256, 256, 3, 6), (256, classes, 1, 1)]
    assert network.head(maps["out"]).shape == (1, classes, 10, 12)
    assert network.head.dropout.p == 0 and network.aux_head is None and network.losses == ("loss",)


def test_ade20k_has_stride_8_a_head_that_joins_its_input_and_an_auxiliary_one():
    network = segmenter("ade20k")
    maps = network.backbone(torch.zeros(1, 3, 160, 192, device="meta"))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {
        "aux": (1, 1024, 20, 24), "out": (1, 2048, 20, 24)}  # fmt: skip
    assert shapes(network.head) == [
        (2048, 512, 3, 1), (512, 512, 3, 1), (2048 + 512, 512, 3, 1), (512, 150, 1, 1)]  # fmt: skip
    assert shapes(network.aux_head) == [(1024, 256, 3, 1), (256, 150, 1, 1)]
    assert network.head.dropout.p == network.aux_head.dropout.p == 0.1
    assert network.aux_weight == 0.4


def test_dilations_of_every_block_are_those_of_the_table():
    def stage(network, name):
        return [
            (c.dilation[0], c.stride[0])
            for c in convs(getattr(network.backbone, name))
            if c.kernel_size == (3, 3)
        ]

    at_16, at_8 = segmenter("voc"), segmenter("ade20k")
    assert stage(at_16, "layer3") == [(1, 2)] + 5 * [(1, 1)]
    assert stage(at_16, "layer4") == [(1, 1), (2, 1), (2, 1)]
    assert stage(at_8, "layer2") == [(1, 2)] + 3 * [(1, 1)]
    assert stage(at_8, "layer3") == [(1, 1)] + 5 * [(2, 1)]
    assert stage(at_8, "layer4") == [(2, 1), (4, 1), (4, 1)]


@pytest.mark.parametrize("stride, replaced", [(16, (False, False, True)), (8, (False, True, True))])
def test_a_dilated_trunk_is_torchvisions_own(stride, replaced):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=replaced)
    ours = build_trunk("resnet50")
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    dilate(ours, stride)
    stages = torchvision.models._utils.IntermediateLayerGetter(theirs.eval(), {"layer4": "out"})
    image = torch.rand(1, 3, 49, 65)
    assert torch.equal(ours.eval()(image), stages(image)["out"]) and ours.stride == stride


def test_what_a_trunk_cannot_do_is_refused():
    with pytest.raises(ValueError, match="8, 16 or 32, not 4"):
        dilate(build_trunk("resnet18"), 4)
    with pytest.raises(ValueError, match="--output-stride 0 for this trunk, whose own is 4"):
        Segmenter(build_trunk("tiny"), 3, output_stride=16)
    with pytest.raises(ValueError, match="set --aux-weight 0"):
        Segmenter(build_trunk("tiny"), 3, output_stride=0, aux_weight=0.4)
    with pytest.raises(ValueError, match="four stages of a ResNet"):
        mask_rcnn(build_trunk("tiny"), 3)


def test_every_weight_of_a_segmenter_learns_and_the_loss_adds_up():
    torch.manual_seed(0)
    network = Segmenter(build_trunk("resnet18"), 5, 8, 8, 2, 1, True, 0.1, 0.4)
    for block in network.backbone.modules():  # zero at the start, which hides the rest of the block
        if isinstance(block, nn.BatchNorm2d):
            nn.init.ones_(block.weight)
    images = torch.randint(0, 256, (2, 3, 40, 48), dtype=torch.uint8)
    loss, numbers = network(images, torch.randint(0, 5, (2, 40, 48)))
    loss.backward()
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in network.parameters())
    torch.testing.assert_close(numbers[0], numbers[1] + 0.4 * numbers[2])
    assert numbers[0] == loss and not numbers.requires_grad and len(numbers) == len(network.losses)


def test_the_loss_is_a_mean_over_all_pixels_of_which_those_without_a_label_are_zero():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 3, 4, generator=generator)
    labels = torch.randint(0, 5, (2, 6, 8), generator=generator)
    labels[0, :2] = IGNORE
    large = F.interpolate(scores, (6, 8), mode="bilinear", align_corners=False)
    total = 0.0
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(8)).tolist():
        if labels[b, y, x] != IGNORE:
            total -= large[b, :, y, x].log_softmax(0)[labels[b, y, x]].item()
    torch.testing.assert_close(pixel_loss(scores, labels).item(), total / (2 * 6 * 8))
    assert pixel_loss(scores, torch.full((2, 6, 8), IGNORE)) == 0


def test_a_head_adds_its_input_only_where_it_is_asked_to():
    torch.manual_seed(0)
    plain, joined = (FCNHead(4, 3, 6, 2, 2, concat=concat) for concat in (False, True))
    assert plain.join is None and joined.join[0].in_channels == 10
    features = torch.randn(2, 4, 7, 9)
    assert plain(features).shape == joined(features).shape == (2, 3, 7, 9)
    assert len(shapes(FCNHead(4, 3, 6, 1))) == 2


# ------------------------------------------------------------------------ reading an image


@pytest.mark.parametrize("length, expected", [
    (2049, [0, 513, 1026, 1280]), (1025, [0, 256]), (769, [0]), (500, [0]), (1282, [0, 513]),
])  # fmt: skip
def test_squares_cover_a_side_and_end_flush_with_it(length, expected):
    assert places(length, 769, 513) == expected


class Position(nn.Module):
    """Scores that say where in its square a pixel stood: each is the mean color of the square."""

    classes = 2

    def scores(self, images):
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return torch.cat([mean, -mean], dim=1).expand(-1, -1, *images.shape[-2:])


def test_scores_of_overlapping_squares_are_averaged():
    images = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    found = slide(Position(), images, window=4, stride=3)
    for y in range(7):
        for x in range(9):
            means = [
                images[..., top : top + 4, left : left + 4].mean().item()
                for top in (0, 3)
                for left in (0, 3, 5)
                if top <= y < top + 4 and left <= x < left + 4
            ]
            assert found[0, 0, y, x].item() == pytest.approx(sum(means) / len(means), abs=1e-6)
    assert torch.equal(found[0, 0], -found[0, 1])


def test_a_prediction_has_the_size_of_its_image_whatever_it_was_read_at():
    torch.manual_seed(0)
    network = Segmenter(build_trunk("tiny"), 3, 0, 8, 1, 1).eval()
    image = torch.randint(0, 256, (3, 21, 34), dtype=torch.uint8)
    whole = predict(network, image)
    assert whole.shape == (21, 34) and whole.unique().numel() > 1
    assert torch.equal(whole, network.scores(image[None])[0].argmax(0))
    assert predict(network, image, scale=(64, 48)).shape == (21, 34)
    assert torch.equal(predict(network, image, window=40, stride=40), whole)
    assert predict(network, image, window=16, stride=8).shape == (21, 34)


@pytest.mark.parametrize("size, frame, expected", [
    ((1024, 2048), (2049, 1025), (1025, 2049)),  # Cityscapes: the long side decides
    ((375, 500), (2049, 513), (513, 684)),  # VOC: the short side decides
    ((500, 375), (2049, 513), (684, 513)),
    ((100, 800), (2048, 512), (256, 2048)),
])  # fmt: skip
def test_an_image_is_fitted_into_a_frame_either_way_round(size, frame, expected):
    assert fitting(size, *frame) == expected


# ------------------------------------------------------------------------ detection


@pytest.fixture(scope="module")
def detector():
    with torch.device("meta"):
        return Detector(mask_rcnn(build_trunk("resnet50"), 80))


def norms_after(module):
    """For every convolution of some sequences: whether a batch norm of its width follows."""
    found = []
    for block in module.modules():
        if isinstance(block, nn.Sequential):
            children = list(block.children())
            for here, after in zip(children, [*children[1:], None]):
                if isinstance(here, nn.Conv2d):
                    norm = isinstance(after, nn.BatchNorm2d)
                    found.append(norm and after.num_features == here.out_channels)
    return found


def test_pyramid_and_heads_have_the_layers_of_the_table(detector):
    network = detector.network
    fpn, heads = network.backbone.fpn, network.roi_heads
    wide = (256, 256, 3, 1)
    assert shapes(fpn.inner_blocks) == [(c, 256, 1, 1) for c in (256, 512, 1024, 2048)]
    assert shapes(fpn.layer_blocks) == 4 * [wide]
    assert shapes(heads.box_head) == 4 * [wide]
    linear = [m for m in heads.box_head.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(256 * 7 * 7, 1024)]
    assert shapes(heads.mask_head) == 4 * [wide]
    assert shapes(network.rpn.head) == [wide, (256, 3, 1, 1), (256, 12, 1, 1)]
    assert heads.box_predictor.cls_score.out_features == 81
    assert heads.box_predictor.bbox_pred.out_features == 4 * 81
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 81
    assert network.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert heads.fg_bg_sampler.batch_size_per_image == 512
    assert network.transform.min_size == (800,) and network.transform.max_size == 1333


def test_norms_stand_where_they_should_and_become_synchronized_everywhere(detector):
    network = detector.network
    assert norms_after(network.backbone.fpn) == 8 * [True]
    assert norms_after(network.roi_heads.box_head) == 4 * [True]
    assert norms_after(network.roi_heads.mask_head) == 4 * [True]
    assert not [m for m in network.rpn.modules() if isinstance(m, nn.BatchNorm2d)]
    body = [m for m in network.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(body) == len(convs(network.backbone.body)) == 53
    count = sum(isinstance(m, nn.BatchNorm2d) for m in detector.modules())
    with torch.device("meta"):
        other = Detector(mask_rcnn(build_trunk("resnet50"), 80))
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(other)
    norm = nn.modules.batchnorm._BatchNorm
    kinds = [type(m) for m in synchronized.modules() if isinstance(m, norm)]
    assert kinds == count * [nn.SyncBatchNorm] and count == 53 + 8 + 4 + 4
    again = parameter_groups(synchronized, 1e-4)[1]["params"]
    assert len(again) == 2 * count  # they stay without decay


def test_nothing_is_frozen(detector):
    for network in (detector, segmenter("voc"), segmenter("ade20k")):
        assert all(p.requires_grad for p in network.parameters())
        assert not [m for m in network.modules() if "Frozen" in type(m).__name__]


def test_norms_are_not_decayed_in_detection_and_everything_else_is(detector):
    decayed, free = parameter_groups(detector, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and free["weight_decay"] == 0
    names = {p: name for name, p in detector.named_parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert {names[p] for p in free["params"]} == {
        f"{module}.{kind}"
        for module, m in detector.named_modules()
        if isinstance(m, nn.BatchNorm2d)
        for kind in ("weight", "bias")
    }
    assert "network.roi_heads.box_predictor.cls_score.bias" in {names[p] for p in decayed["params"]}


def test_every_weight_of_a_detector_learns_from_one_object():
    torch.manual_seed(0)
    detector = Detector(mask_rcnn(build_trunk("resnet18"), 3, smallest_anchor=8, regions=8))
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    _, target = black_objects()
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    loss, numbers = detector([image, image.flip(-1)], [target, target])
    loss.backward()
    torch.testing.assert_close(numbers[0], numbers[1:].sum())
    still = [name for name, p in detector.named_parameters() if p.grad is None]
    assert not still
    assert numbers.isfinite().all() and len(numbers) == 6


# ------------------------------------------------------------------------ files without counts


def without_counts(state, folder):
    """A file as torch before 0.4.1 wrote it, and how many counts it lacks."""
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, folder / "old.pth")
    return folder / "old.pth", len(state) - len(old)


def trunk_that_counted(arch):
    torch.manual_seed(0)
    trunk = build_trunk(arch)
    for name, value in trunk.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
        elif name.endswith("running_mean"):
            value.normal_()
    return trunk.state_dict()


@pytest.mark.parametrize("arch", ["tiny", "resnet18"])
def test_a_trunk_without_counts_of_batches_is_whole_and_they_are_zero(arch, tmp_path):
    state = trunk_that_counted(arch)
    file, counts = without_counts(state, tmp_path)
    trunk, found, line = open_trunk(str(file), "")
    assert found == arch and f"torchvision's names, {counts} counts of batches set to 0" in line
    for name, value in trunk.state_dict().items():
        counted = name.endswith("num_batches_tracked")
        assert value.eq(0).all() if counted else value.equal(state[name])
    if arch == "resnet18":
        torch.save(dict(model=to_detectron2(torch.load(file))), tmp_path / "detectron2.pth")
        assert open_trunk(str(tmp_path / "detectron2.pth"), "")[1] == arch
    torch.save(state, file)  # a file that has them keeps them
    trunk, _, line = open_trunk(str(file), "")
    assert "set to 0" not in line and all(v.equal(state[k]) for k, v in trunk.state_dict().items())


def test_a_trunk_that_lacks_more_than_counts_is_refused(tmp_path):
    state = trunk_that_counted("resnet18")
    del state["bn1.running_mean"]
    file, _ = without_counts(state, tmp_path)
    with pytest.raises(ValueError, match=r"it lacks 1 tensors, first bn1\.running_mean"):
        open_trunk(str(file), "")
    state = trunk_that_counted("tiny")
    del state["4.running_mean"]
    file, _ = without_counts(state, tmp_path)
    with pytest.raises(ValueError, match=r": 2 of its .* first student.*4\.running_mean"):
        start_from(small_slotcon(), file)


def test_a_pretraining_starts_from_a_trunk_without_counts_of_batches(tmp_path):
    state = trunk_that_counted("tiny")
    file, counts = without_counts(state, tmp_path)
    model = small_slotcon()
    line = start_from(model, file)
    assert f"{2 * (len(state) - counts)} of {len(model.state_dict())} tensors used" in line
    for network in (model.student, model.teacher):
        for name, value in network.backbone.state_dict().items():
            counted = name.endswith("num_batches_tracked")
            assert value.eq(0).all() if counted else value.equal(state[name])


def small_slotcon():
    return SlotCon("tiny", num_prototypes=5, dim_hidden=9, dim_out=7)


# ------------------------------------------------------------------------ schedules


def test_the_1x_schedule_warms_up_and_falls_twice():
    s = settings.schedule_of(settings.DETECTION["coco"])
    assert (s.total_steps, s.last_step, s.peak, s.warmup_steps) == (90_000, 90_000, 0.02, 1000)
    assert s.learning_rate(0) == pytest.approx(0.02 / 1000)
    assert s.learning_rate(500) == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    for step, rate in ((1000, 0.02), (59_999, 0.02), (60_000, 0.002), (80_000, 0.0002)):
        assert s.learning_rate(step) == pytest.approx(rate)


@pytest.mark.parametrize("dataset, at", [("voc", (30, 21, 27)), ("cityscapes", (90, 63, 81))])
def test_segmentation_falls_where_the_table_says(dataset, at):
    s = settings.schedule_of(settings.SEGMENTATION[dataset])
    assert s.total_steps == at[0] * 1000
    for milestone in at[1:]:
        before, after = s.learning_rate(milestone * 1000 - 1), s.learning_rate(milestone * 1000)
        assert after == pytest.approx(before / 10)
    assert s.learning_rate(0) == s.peak == {"voc": 0.003, "cityscapes": 0.01}[dataset]


def test_ade20k_falls_as_a_polynomial_to_its_smallest_rate():
    s = settings.schedule_of(settings.SEGMENTATION["ade20k"])
    assert s.total_steps == 80_000 and s.learning_rate(0) == 0.01
    assert s.learning_rate(40_000) == pytest.approx(1e-4 + 0.0099 * 0.5**0.9)
    assert s.learning_rate(79_999) == pytest.approx(1e-4, rel=0.01)


def test_another_batch_size_sees_as_many_images_at_a_rate_in_proportion():
    c = settings.DETECTION["coco"]
    half = settings.schedule_of(type(c)(**{**vars(c), "batch_size": 8, "max_steps": 7}))
    assert (half.total_steps, half.last_step, half.peak) == (180_000, 7, 0.01)
    assert half.learning_rate(120_000) == pytest.approx(0.001)


def test_a_rate_without_warm_up_begins_at_its_peak():
    assert FineTuning(10, 100, 100, 3.0).learning_rate(0) == 3.0
