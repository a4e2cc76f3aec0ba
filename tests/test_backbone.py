"""backbone.py: the trunks are torchvision's ResNets without their classifier, and a small one for
toy images.

Promised: torchvision's keys and numbers; blocks that start as the identity; published parameter
counts; a tiny trunk that sees 17 px and cannot tell where the border is; a projector that treats
every pixel alike.
"""

import math

import pytest
import torch
import torchvision
from torch import nn

from backbone import ARCHITECTURES, Projector, build_trunk

RESNETS = [arch for arch in ARCHITECTURES if arch.startswith("resnet")]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------ ResNets


@pytest.mark.parametrize("arch", RESNETS)
def test_names_and_shapes_are_torchvisions_and_only_the_classifier_is_missing(arch):
    with torch.device("meta"):
        ours, theirs = build_trunk(arch), getattr(torchvision.models, arch)()
    shapes = {
        key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")
    }
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])


def test_with_torchvisions_weights_the_map_is_torchvisions_last_one():
    theirs = torchvision.models.resnet18().double().eval()
    ours = build_trunk("resnet18").double().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    images = random(2, 3, 64, 96)
    up_to_pooling = nn.Sequential(*list(theirs.children())[:-2])
    assert torch.allclose(ours(images), up_to_pooling(images), rtol=1e-12)


@pytest.mark.parametrize(
    "arch, channels",
    [
        ("resnet18", 512),
        ("resnet34", 512),
        ("resnet50", 2048),
        ("resnet101", 2048),
        ("tiny", 64),
        ("small", 192),
    ],
)
def test_the_map_has_the_stride_and_the_channels_that_the_trunk_announces(arch, channels):
    with torch.device("meta"):
        trunk = build_trunk(arch)
        features = trunk(torch.empty(2, 3, 96, 160))
    assert trunk.stride == {"tiny": 4, "small": 8}.get(arch, 32)
    assert trunk.out_channels == channels
    assert features.shape == (2, channels, 96 // trunk.stride, 160 // trunk.stride)


def test_a_resnet_50_and_its_projector_have_the_published_number_of_parameters():
    with torch.device("meta"):
        assert count(build_trunk("resnet50")) == 23_508_032
        assert count(Projector(2048, 4096, 256)) == 26_239_232


@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_every_residual_block_starts_as_its_shortcut(arch, last):
    trunk = build_trunk(arch).eval()
    blocks = [
        block
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        for block in stage
    ]
    assert len(blocks) in (8, 16)
    for block in blocks:
        assert getattr(block, last).weight.eq(0).all() and getattr(block, last).bias.eq(0).all()
    x = torch.rand(1, 256 if last == "bn3" else 64, 3, 5)
    assert trunk.layer1[1](x).equal(x)


def test_convolutions_start_from_a_normal_of_the_fan_out_and_norms_from_one_and_zero():
    trunk = build_trunk("resnet18")
    zeroed = {f"layer{i}.{j}.bn2" for i in range(1, 5) for j in range(2)}
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            out, _, kh, kw = module.weight.shape
            assert module.weight.std().item() == pytest.approx(
                math.sqrt(2 / (kh * kw * out)), rel=0.05
            ), name
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(0 if name in zeroed else 1).all() and module.bias.eq(0).all()
            assert (module.eps, module.momentum) == (1e-5, 0.1)


def test_an_unknown_architecture_is_named_with_the_ones_there_are():
    with pytest.raises(
        ValueError,
        match=r"unknown architecture 'resnet19': choose one of tiny, small, resnet18, .*resnet101",
    ):
        build_trunk("resnet19")


# ---------------------------------------------------------------------------------- tiny, small


def seen_by(trunk, image, row, column):
    """(height, width) of the part of the image on which one position of the map depends."""
    image.requires_grad_(True)
    (gradient,) = torch.autograd.grad(trunk(image)[0, :, row, column].sum(), image)
    rows, columns = (gradient.abs().sum((0, 1)).sum(axis).nonzero() for axis in (1, 0))
    return tuple((span.max() - span.min() + 1).item() for span in (rows, columns))


@pytest.mark.parametrize("arch, field", [("tiny", 17), ("small", 71)])
def test_a_position_of_the_map_sees_the_announced_pixels_each_way(arch, field):
    trunk = build_trunk(arch).eval()
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.uniform_(module.weight, 0.05, 0.15)  # positive weights: no ReLU hides a path
    assert seen_by(trunk, torch.rand(1, 3, 128, 160), 64 // trunk.stride, 9) == (field, field)


@pytest.mark.parametrize("arch", ["tiny", "small"])
def test_a_trunk_of_ours_has_fewer_than_a_million_parameters(arch):
    assert 10_000 < count(build_trunk(arch)) < 1_000_000


@pytest.mark.parametrize("arch", ["tiny", "small"])
@pytest.mark.parametrize("training", [True, False])
def test_a_trunk_of_ours_does_not_show_where_the_border_is(arch, training):
    trunk = build_trunk(arch).double().train(training)
    images = random(2, 3, 1, 1).expand(-1, -1, 32, 48)  # each one color
    features = trunk(images)
    # Not all zero: of 100 random trunks the flattest has 0.085, where no batch norm stretches it.
    assert features.std() > 0.02
    assert torch.allclose(features, features[:, :, :1, :1].expand_as(features), atol=1e-9)


@pytest.mark.parametrize("period", [6, 8, 12])  # px
def test_the_tiny_trunk_hardly_says_where_in_its_period_a_texture_lies(period):
    """Over stripes the map is nearly the same everywhere; without its mean over 3x3 cells a place
    on a crest and a place in a trough differ nearly as much as two channels do.
    """
    layers = list(build_trunk("tiny").double().eval())
    mean, norm = layers[9:11]
    assert isinstance(mean, nn.AvgPool2d)
    stripes = (2 * math.pi * torch.arange(96, dtype=torch.float64) / period).sin()

    def difference(*last):
        maps = nn.Sequential(*layers[:9], *last)(stripes.expand(1, 3, 96, 96))
        row = maps[0, :, 12, 4:-4]  # (c w), away from the border
        return row.std(dim=1).mean() / row.mean(dim=1).std()

    # Four random trunks: up to 0.22, and from 0.55 on
    assert difference(mean, norm) < 0.35 < 0.45 < difference(norm)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_tiny_trunk_does_not_say_how_strong_a_texture_is(factor):
    trunk = build_trunk("tiny").double().eval()
    texture = 3 * random(1, 3, 48, 48)
    features = trunk(texture)
    assert torch.allclose(trunk(factor * texture), features, atol=0.02 * features.std().item())


# ---------------------------------------------------------------------------------------- projector


def test_the_projector_is_three_matrices_with_norm_and_exact_gelu_between_at_every_pixel():
    b, c, hidden, d, h, w = 2, 3, 5, 4, 6, 7
    projector = Projector(c, hidden, d).double().eval()
    for i, p in enumerate([*projector.parameters(), *projector.buffers()]):
        if p.is_floating_point():
            p.data = random(*p.shape, seed=i).abs() + 0.1  # nothing left at its start
    layers, features = projector.mlp, random(b, c, h, w, seed=99)
    expected = torch.empty(b, d, h, w, dtype=torch.float64)
    for i in range(b):
        for row in range(h):
            for column in range(w):
                x = features[i, :, row, column]
                for linear, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
                    x = linear.weight[:, :, 0, 0] @ x + linear.bias
                    x = (x - norm.running_mean) / (
                        norm.running_var + 1e-5
                    ).sqrt() * norm.weight + norm.bias
                    x = x.new_tensor([t * (1 + math.erf(t / math.sqrt(2))) / 2 for t in x.tolist()])
                expected[i, :, row, column] = layers[6].weight[:, :, 0, 0] @ x + layers[6].bias
    assert torch.allclose(projector(features), expected, rtol=1e-12)


def test_moving_the_pixels_moves_the_embeddings_and_changes_none():
    projector, features = (
        Projector(3, 5, 4).double(),
        random(2, 3, 6, 7),
    )  # in training mode: same set, same statistics
    moved = features.flip(2).roll(3, dims=3)
    assert torch.allclose(projector(moved), projector(features).flip(2).roll(3, dims=3), rtol=1e-9)


def test_the_projector_starts_from_small_normals_and_zero_biases():
    projector = Projector(64, 96, 80)
    for layer in (projector.mlp[0], projector.mlp[3], projector.mlp[6]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert layer.weight.abs().max() > 0.06  # normal, not uniform, and not cut at two sigma
        assert layer.bias.eq(0).all()
    assert len(projector.mlp) == 7  # no norm at the end
