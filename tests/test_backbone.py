"""backbone.py: torchvision's ResNets without classifier, two small backbones, the projector."""

import math
import sys

import pytest
import torch
import torchvision
from torch import nn

from backbone import ARCHITECTURES, RESNETS, Projector, architecture_of, build_backbone
from trained import random


@pytest.mark.parametrize("arch", RESNETS)
def test_names_and_shapes_are_torchvisions_and_only_the_classifier_is_missing(arch):
    with torch.device("meta"):
        ours, theirs = build_backbone(arch), getattr(torchvision.models, arch)()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


@pytest.mark.parametrize("arch, last, channels", [
    ("resnet18", "bn2", 64), ("resnet50", "bn3", 256),
])  # fmt: skip
def test_every_residual_block_starts_as_its_shortcut(arch, last, channels):
    network = build_backbone(arch).eval()
    norms = [module for name, module in network.named_modules() if name.endswith(f".{last}")]
    assert len(norms) in (8, 16) and all(norm.weight.eq(0).all() for norm in norms)
    x = torch.rand(1, channels, 3, 5)
    assert network.layer1[1](x).equal(x)


def test_convolutions_start_from_a_normal_of_the_fan_out_and_norms_like_the_released_ones():
    for module in build_backbone("resnet18").modules():
        if isinstance(module, nn.Conv2d):
            out, _, kh, kw = module.weight.shape
            expected = math.sqrt(2 / (kh * kw * out))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1) and module.bias.eq(0).all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_map_has_the_announced_stride_and_channels_and_names_tell_the_architecture(arch):
    with torch.device("meta"):
        network = build_backbone(arch)
        features = network(torch.empty(2, 3, 96, 160))
    expected = {"tiny": (4, 64), "small": (8, 192), "resnet18": (32, 512), "resnet34": (32, 512)}
    assert (network.stride, network.out_channels) == expected.get(arch, (32, 2048))
    assert features.shape == (2, network.out_channels, 96 // network.stride, 160 // network.stride)
    assert architecture_of({**network.state_dict(), "fc.weight": torch.empty(3, 4)}) == arch


@pytest.mark.parametrize("arch, field", [("tiny", 17), ("small", 71)])
def test_a_position_of_the_map_sees_the_announced_pixels_each_way(arch, field):
    network = build_backbone(arch).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.05, 0.15)  # positive weights: no ReLU hides a path
    image = torch.rand(1, 3, 128, 160, requires_grad=True)
    network(image)[0, :, 64 // network.stride, 9].sum().backward()
    seen = image.grad.abs().sum((0, 1))
    for span in (seen.sum(1).nonzero(), seen.sum(0).nonzero()):
        assert span.max() - span.min() + 1 == field


@pytest.mark.parametrize("arch", ["tiny", "small"])
@pytest.mark.parametrize("training", [True, False])
def test_a_backbone_of_ours_is_small_and_does_not_show_where_the_border_is(arch, training):
    network = build_backbone(arch).double().train(training)
    assert 10_000 < sum(p.numel() for p in network.parameters()) < 1_000_000
    features = network(random(2, 3, 1, 1).expand(-1, -1, 32, 48))  # images of one color each
    # Not all zero: of 100 random networks the flattest has 0.085 without batch statistics.
    assert features.std() > 0.02
    assert torch.allclose(features, features[:, :, :1, :1].expand_as(features), atol=1e-9)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_tiny_backbone_does_not_say_how_strong_a_texture_is(factor):
    network, texture = build_backbone("tiny").double().eval(), 3 * random(1, 3, 48, 48)
    features = network(texture)
    assert torch.allclose(network(factor * texture), features, atol=0.02 * features.std().item())


def test_the_projector_starts_from_small_normals_and_zero_biases():
    projector = Projector(64, 96, 80)
    assert len(projector.mlp) == 7  # no norm at the end
    for layer in (projector.mlp[0], projector.mlp[3], projector.mlp[6]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.weight.abs().max() > 0.06  # normal, not uniform, and not cut at two sigma
        assert layer.bias.eq(0).all()


def test_without_timm_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="--arch timm:test_vit needs timm: pip install timm"):
        build_backbone("timm:test_vit")
