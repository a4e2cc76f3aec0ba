"""photometric.py: one vectorized chain, equal to torchvision's operations one by one."""

import colorsys
import itertools
import math

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from photometric import IMAGENET_MEAN, IMAGENET_STD, Photometric, gaussian_blur, normalize, turn_hue

BLENDS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
B, V, Y, X = 5, 2, 21, 34
OFF = dict(jitter=(0.4, 0.4, 0.2, 0.1, 0), p_gray=0, p_blur=(0, 0), solarize=(0, 0, 128))


def batch(b=B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, V, 3, Y, X), generator=generator, dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def with_torchvision(view, draw, photometric, i, v):
    """The chain from its description, one operation of torchvision after the other."""
    x, done = view.float() / 255, 0
    for place in range(4):
        if draw.hue is not None and place == draw.hue_position[i, v]:
            x = TF.adjust_hue(x, draw.hue[i, v].item())
        elif draw.order is not None and done < 3:
            kind = draw.order[i, v, done].item()
            x, done = BLENDS[kind](x, draw.factors[i, v, kind].item()), done + 1
    if draw.gray is not None and draw.gray[i, v]:
        x = TF.rgb_to_grayscale(x, 3)
    if draw.sigma is not None and draw.sigma[i, v] > 0:
        x = TF.gaussian_blur(x, [17, 17], [draw.sigma[i, v].item()] * 2)
    if draw.solarize is not None and draw.solarize[i, v]:
        x = TF.solarize(x, photometric.solarize[2] / 255)
    return TF.normalize(x, list(IMAGENET_MEAN), list(IMAGENET_STD))


@pytest.mark.parametrize("settings", [
    {}, {"jitter": (0.9, 0.9, 0.9, 0.5, 1), "p_gray": 0.5},
    {"p_blur": (0.5, 0.5), "solarize": (0.5, 0.5, 0)}, {"jitter": (0.4, 0.4, 0.2, 0, 0.8)},
    {"jitter": (0.4, 0.4, 0.2, 0.1, 0)}, {"jitter": (0, 0, 0, 0.5, 0.8)},
    {"jitter": (1.8, 0.4, 0.2, 0.1, 0.8), "p_blur": (0, 0)},
], ids=str)  # fmt: skip
def test_every_view_is_what_torchvision_makes_of_it_with_the_same_parameters(settings):
    photometric, images = Photometric(**settings), batch(b=9)
    draw = photometric.draw(9, seeded(1))
    changed = photometric.apply(images, draw)
    assert changed.shape == images.shape and changed.dtype == torch.float32
    for i, v in itertools.product(range(9), range(V)):
        expected = with_torchvision(images[i, v], draw, photometric, i, v)
        torch.testing.assert_close(changed[i, v], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("turn", [-0.5, -0.21, 0, 1e-3, 1 / 6, 1 / 3, 0.5])
def test_hue_turns_the_circle_of_hue_saturation_value(turn):
    ties = list(itertools.product([0, 0.25, 1], repeat=3))  # grays and black among them
    colors, expected = ties + torch.rand(40, 3, generator=seeded()).tolist(), []
    for color in colors:
        h, s, v = colorsys.rgb_to_hsv(*color)
        expected.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    pixels, expected = (torch.tensor(x).T.reshape(1, 3, 1, -1) for x in (colors, expected))
    turned = turn_hue(pixels, torch.tensor([turn]))
    torch.testing.assert_close(turned, expected, rtol=0, atol=2e-6)


def test_blur_is_in_float32_under_autocast_and_takes_images_of_one_column():
    pixels, sigma = torch.rand(3, 3, 40, 24, generator=seeded()), torch.tensor([0.0, 0.5, 1.9])
    together = gaussian_blur(pixels, sigma, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_blur(pixels, sigma, 8), together)
    torch.testing.assert_close(together[0], pixels[0], rtol=0, atol=1e-7)  # 0 is sharp
    assert gaussian_blur(pixels[:1, :, :4, :1], sigma[2:], 8).shape == (1, 3, 4, 1)


def test_normalize_takes_gray_levels_and_fractions():
    images = batch()[:, 0]
    expected = TF.normalize(images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    torch.testing.assert_close(normalize(images), expected)
    torch.testing.assert_close(normalize(images.float() / 255), expected)
    torch.testing.assert_close(normalize(images[0]), expected[0])
    assert normalize(images.double() / 255).dtype == torch.float64


def test_draws_follow_their_distributions():
    draw, near = Photometric().draw(20_000, seeded()), dict(abs=0.015)
    jittered = (draw.factors != 1).any(dim=-1)
    assert jittered.float().mean().item() == pytest.approx(0.8, **near)
    assert torch.equal(jittered, draw.hue != 0)
    for kind, strength in enumerate((0.4, 0.4, 0.2)):
        factors = draw.factors[..., kind][jittered]
        assert 1 - strength <= factors.min() and factors.max() <= 1 + strength
        assert factors.mean().item() == pytest.approx(1, **near)
        assert factors.std().item() == pytest.approx(2 * strength / math.sqrt(12), **near)
    hue = draw.hue[jittered]
    assert -0.1 <= hue.min() < -0.099 and 0.099 < hue.max() <= 0.1
    assert draw.gray.float().mean().item() == pytest.approx(0.2, **near)
    assert (draw.sigma > 0).float().mean(0).tolist() == pytest.approx([1, 0.1], **near)
    assert 0.1 <= draw.sigma[:, 0].min() < 0.11 and 1.99 < draw.sigma[:, 0].max() <= 2
    assert draw.solarize.float().mean(0).tolist() == pytest.approx([0, 0.2], **near)
    # Every order of the four steps is as likely.
    sequences = (draw.order * torch.tensor([9, 3, 1])).sum(-1) * 4 + draw.hue_position
    counts = sequences.unique(return_counts=True)[1]
    assert len(counts) == 24 and counts.min() > 0.85 * counts.float().mean()


def test_views_are_a_function_of_images_and_generator_however_they_lie_in_memory():
    images, generator = batch(), seeded()
    before, changed = images.clone(), Photometric()(images, generator)
    assert torch.equal(images, before) and not changed.requires_grad
    assert not torch.equal(Photometric()(images, generator), changed)  # the next batch
    lying = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(Photometric()(lying, seeded()), changed)
    assert Photometric()(batch(b=0), seeded()).shape == (0, V, 3, Y, X)


def test_with_all_probabilities_at_zero_views_are_only_normalized():
    torch.testing.assert_close(Photometric(**OFF)(batch(), seeded()), normalize(batch()))
    assert all(part is None for part in Photometric(**OFF).draw(B, seeded()))
