"""Photographs: odd files are used as they should, bad ones are named, and of a large JPEG only the
scale that the crops need is decoded.
"""

import io
import math
import os
import random
import re
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from data import TwoCrops, draw_crop
from engine.batches import Samples, check_images, name_skipped, too_many
from engine.images import BadImage, Photographs

GRADIENT = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)
FRAMES = [Image.new("RGB", (16, 12), color) for color in ("red", "lime", "blue")]
GRAY = Image.fromarray(GRADIENT)
BITS = GRAY.convert("1", dither=Image.Dither.NONE)
RANDOM = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8))
UNIT = (GRADIENT / np.float32(255) - 1).astype(np.float32)
UNIT[-1, -1] = np.nan  # what is no number counts as 0, the largest of these
WHITE, MANY = Image.new("RGB", (16, 12), "white"), dict(save_all=True, append_images=FRAMES[1:])
SIZE, HEIGHT, WIDTH = 24, 301, 403
Y, X = np.mgrid[:HEIGHT, :WIDTH]
PLACES = 255 * np.stack([X / WIDTH, Y / HEIGHT, 0.5 + 0 * X])  # (3 y x): a color is its place
UPRIGHT = {1: "", 2: "x", 3: "xy", 4: "y", 5: "t", 6: "tx", 7: "txy", 8: "ty"}


def plain(color, mode="RGB"):
    return Image.new(mode, (16, 12), color)


@pytest.mark.parametrize("name, image, expected, options", [
    ("gray.png", GRAY, GRAY, {}),
    ("bits.png", BITS, GRAY.point(lambda value: 255 * (value > 127)), {}),
    ("palette.png", RANDOM.quantize(256), RANDOM.quantize(256), {}),
    ("print.jpg", plain((0, 255, 255, 0), "CMYK"), FRAMES[0], dict(quality=95)),
    ("deep.png", Image.fromarray(GRADIENT.astype(np.uint16) * 257), GRAY, {}),
    ("12 bits.png", Image.fromarray(GRADIENT.astype(np.uint16) * 16 + 9), GRAY, {}),
    ("deeper.tif", Image.fromarray(GRADIENT.astype(np.int32) * 1000), GRAY, {}),
    ("float.tif", Image.fromarray(UNIT), GRAY, {}),
    ("clear.png", plain((0, 100, 200, 0), "RGBA"), WHITE, {}),
    ("haze.png", plain((0, 100, 200, 51), "RGBA"), plain((204, 224, 244)), {}),
    ("gray and clear.png", plain((10, 0), "LA"), WHITE, {}),
    ("key.png", plain((9, 9, 9)), WHITE, dict(transparency=(9, 9, 9))),
    ("palette.gif", plain(1, "P"), WHITE, dict(transparency=1)),
    ("moves.gif", FRAMES[0], FRAMES[0], MANY),
    ("moves.webp", FRAMES[0], FRAMES[0], dict(lossless=True, **MANY)),
    ("metadata.png", RANDOM, RANDOM, dict(exif=b"Exif\0\0XX\0*\0\0\0\x08")),
])  # fmt: skip
def test_odd_files_are_images_with_these_pixels(tmp_path, name, image, expected, options):
    image.save(tmp_path / name, **options)
    pixels = Photographs(tmp_path, [name])[0].pixels().image
    pixels = pixels.permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(expected.convert("RGB"), dtype=int)
    tolerance = 3 if name == "print.jpg" else 0
    assert pixels.shape == (12, 16, 3) and np.abs(pixels - expected).max() <= tolerance


def encoded(image, format):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def png_that_claims(*size):
    content = encoded(plain(7), "PNG")
    header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


JPEG, PNG = encoded(RANDOM.resize((300, 200)), "JPEG"), encoded(RANDOM, "PNG")


@pytest.mark.parametrize("make, reason", [
    (lambda p: p.write_bytes(JPEG[:3000]), "truncated"),
    (lambda p: p.write_bytes(PNG[:100] + b"x" * 9 + PNG[109:]), "broken data stream"),
    (lambda p: p.touch(), "^empty file$"),
    (lambda p: p.write_text("<html>404</html>"), "^not an image that Pillow knows$"),
    (lambda p: p.write_bytes(png_that_claims(40_000, 40_000)), "exceeds limit .* bomb"),
    (lambda p: p.write_bytes(png_that_claims(13_400, 13_400)), "exceeds limit .* bomb"),
    (lambda p: (p.mkdir(), (p / "x").touch()), "^(is a directory|permission denied)$"),
    (lambda p: os.mkfifo(p), "^empty file$"),
    (lambda p: p.symlink_to(p), "^too many levels of symbolic links$"),
    (lambda p: p.symlink_to(p.with_name("gone")), "^no such file or directory$"),
])  # fmt: skip
def test_a_file_that_is_no_image_is_named_with_the_reason(tmp_path, make, reason):
    make(tmp_path / "x.jpg")
    with pytest.raises(BadImage) as error:
        Photographs(tmp_path, ["x.jpg"])[0].pixels(8)
    assert error.value.name == "x.jpg" and re.search(reason, error.value.reason)
    assert "\n" not in error.value.reason and str(tmp_path) not in error.value.reason


def test_a_photograph_of_108_megapixels_is_decoded(tmp_path):
    Image.new("L", (12_000, 9_000), 77).save(tmp_path / "phone.jpg")
    pixels = Photographs(tmp_path, ["phone.jpg"])[0].pixels(8)
    assert pixels.image.shape == (3, 1125, 1500) and (pixels.image == 77).all()


def test_images_of_one_color_or_almost_black_are_named_by_the_check(tmp_path, capsys):
    dark = RANDOM.point(lambda value: value // 20)
    for name, image in (("a.png", plain((9, 200, 30))), ("b.png", dark), ("c.png", RANDOM)):
        image.save(tmp_path / name)
    (tmp_path / "d.png").touch()
    names = ["a.png", "b.png", "c.png", "d.png"]
    assert not check_images({"to learn from": Photographs(tmp_path, names)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["look at  a.png: one color", "look at  b.png: almost black"]
    assert lines[2] == "bad      d.png: empty file"
    assert lines[-2:] == [
        "checked  4 images to learn from: 3 can be read, 1 cannot",
        "result   a run would not stop at so many bad images: its limit is 1%, or one",
    ]


def folder_with_bad(folder, bad, count=9):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        content = encoded(plain((number * 20,) * 3), "PNG")
        # Some are found out when they are opened, others when they are decoded
        content = JPEG[: 3000 * (number % 2)] if number in bad else content
        (folder / f"{number}.png").write_bytes(content)
    return Photographs(folder, [f"{number}.png" for number in range(count)])


def test_the_next_readable_neighbor_stands_in_with_the_random_numbers_of_the_sample(tmp_path):
    samples = Samples(folder_with_bad(tmp_path / "bad", {2, 3, 8}), TwoCrops(8), 0)
    whole = Samples(folder_with_bad(tmp_path / "whole", {}), TwoCrops(8), 0)
    for index, stand_in, failed in [(1, 1, []), (2, 4, [2, 3]), (3, 4, [3]), (8, 0, [8])]:
        batch, failures = samples[9 + index]
        assert (batch.views == stand_in * 20).all()
        assert [name for name, _ in failures] == [f"{number}.png" for number in failed]
        assert torch.equal(batch.boxes, whole[9 + index][0].boxes)
    with pytest.raises(ValueError, match=r"^3 images in a row could not be read; 0\.png: empty"):
        Samples(folder_with_bad(tmp_path / "worst", range(3), count=3), TwoCrops(8), 0)[1]


def test_each_bad_file_is_written_once_whatever_its_name(tmp_path, capfd):
    file = tmp_path / "skipped.txt"
    bad = [(name, "truncated") for name in ("ä.jpg", "c.jpg", "new\nline.jpg")]
    for failures in (bad[:2] + bad[:1], bad[1:], [(os.fsdecode(b"caf\xe9.jpg"), "truncated")]):
        name_skipped(file, failures, 400)
    names = [b"c.jpg", b"caf\xe9.jpg", b"new line.jpg", "ä.jpg".encode()]
    assert sorted(file.read_bytes().splitlines()) == [name + b"\ttruncated" for name in names]
    assert not too_many(1, 9) and too_many(2, 9)  # one bad image ends no run
    assert capfd.readouterr().err.count("its neighbor takes its place") == 1
    name_skipped(tmp_path, bad, 400)  # a folder: a list that cannot be written
    assert "could not write to" in capfd.readouterr().err


def saved(folder, orientation=1, format="JPEG", mode="RGB"):
    """The same file as an image and as a photograph."""
    exif, image = Image.Exif(), Image.fromarray(PLACES.round().astype(np.uint8).transpose(1, 2, 0))
    exif[0x0112] = orientation
    more = dict(save_all=True, append_images=[image]) if format == "MPO" else {}
    image.convert(mode).save(folder / "a.jpg", format, quality=97, exif=exif, **more)
    if format == "PNG":  # which may note its orientation behind the pixels
        content = (folder / "a.jpg").read_bytes()
        note = content[content.index(b"eXIf") - 4 : content.index(b"IDAT") - 4]
        (folder / "a.jpg").write_bytes(content.replace(note, b"")[:-12] + note + content[-12:])
    photographs = Photographs(folder, ["a.jpg"])
    return photographs[0].pixels().image, photographs


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_stand_upright_whole_and_reduced(tmp_path, orientation):
    steps, expected = UPRIGHT[orientation], torch.tensor(PLACES)
    expected = expected.mT if "t" in steps else expected
    expected = expected.flip([{"x": 2, "y": 1}[step] for step in steps.strip("t")])
    for format, factor in [("PNG", 1), ("JPEG", 8)]:
        whole, photographs = saved(tmp_path, orientation, format)
        assert photographs[0].shape == whole.shape == expected.shape
        assert (whole - expected).abs().max() < 4
        pixels = photographs[0].pixels(8)
        corner = pixels.image[:, : 96 // factor, : 64 // factor].double().mean(dim=(1, 2))
        assert pixels.factor == factor
        assert (corner - expected[:, :96, :64].mean(dim=(1, 2))).abs().max() < 5


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_views_of_a_reduced_photograph_are_those_of_the_whole(tmp_path, orientation):
    (whole, photographs), crops = saved(tmp_path, orientation), TwoCrops(SIZE)
    for seed in range(40):
        photograph, rng = photographs[0], random.Random(seed)
        photograph.pixels = Mock(wraps=photograph.pixels)
        views, boxes, flipped = crops(photograph, random.Random(seed))
        one = draw_crop(*photograph.shape[1:], rng)
        other = draw_crop(*photograph.shape[1:], rng, other=one)
        photograph.pixels.assert_called_once_with(min(one[2:] + other[2:]) / SIZE)
        expected = crops(whole, random.Random(seed))
        assert flipped.equal(expected.flipped) and (boxes - expected.boxes).abs().max() < 1 / SIZE
        assert (views.float() - expected.views).abs().max() < 9


@pytest.mark.parametrize("kind", ["JPEG RGB", "JPEG L", "JPEG CMYK", "MPO RGB"])
def test_jpegs_of_every_kind_are_decoded_at_the_smallest_scale_that_is_allowed(tmp_path, kind):
    whole, photographs = saved(tmp_path, 1, *kind.split())
    for factor, mosts in {1: (0.3, 1, 1.99), 2: (2, 3.9), 4: (4, 7.9), 8: (8, 99)}.items():
        for pixels in (photographs[0].pixels(most) for most in mosts):
            assert pixels.factor == factor
            assert pixels.image.shape == (3, math.ceil(HEIGHT / factor), math.ceil(WIDTH / factor))
            difference = pixels.image.float().mean(dim=(1, 2)) - whole.float().mean(dim=(1, 2))
            assert difference.abs().max() < 2


def test_where_nothing_can_be_saved_every_bit_is_the_same(tmp_path):
    whole, photographs = saved(tmp_path, orientation=6)
    for crops in (TwoCrops(160), TwoCrops(SIZE, geometric=False)):  # half of 301 px is less
        one, other = (crops(image, random.Random(3)) for image in (whole, photographs[0]))
        assert all(map(torch.equal, one, other))
