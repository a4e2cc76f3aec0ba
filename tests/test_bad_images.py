"""engine/images.py and engine/loader.py: files of every kind, used correctly or skipped and named
once.
"""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import TwoCrops
from engine.images import BadImage, ImageFiles, find_images
from engine.loader import RunSampler, Samples, Skipped, make_loader, report_check

GRADIENT = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)


def photograph(height=12, width=16, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def read(path):
    return ImageFiles(path.parent, np.array([path.name]))[0]


def samples_of(images, size, seed=0, **settings):
    """What a run sees of these images."""
    return Samples(images, TwoCrops(size, **settings), seed)


def assert_pixels(path, expected, tolerance=0):
    """expected: (y x 3) or (y x) array, or one color."""
    pixels = read(path).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(expected, dtype=int)
    if expected.ndim == 2:
        expected = expected[..., None]
    assert (
        pixels.dtype == int
        and np.abs(pixels - np.broadcast_to(expected, pixels.shape)).max() <= tolerance
    )


# -------------------------------------------------------------------------------- odd, but images


def test_gray_is_three_times_the_same(tmp_path):
    Image.fromarray(GRADIENT).save(tmp_path / "gray.png")
    assert_pixels(tmp_path / "gray.png", GRADIENT)


def test_black_and_white_and_palette(tmp_path):
    Image.fromarray(GRADIENT).convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    assert_pixels(tmp_path / "bits.png", np.where(GRADIENT > 127, 255, 0))
    image = photograph().quantize(256)
    image.save(tmp_path / "palette.png")
    assert_pixels(tmp_path / "palette.png", np.asarray(image.convert("RGB")))


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 12), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    assert_pixels(tmp_path / "print.jpg", (255, 0, 0), tolerance=3)


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    Image.fromarray(GRADIENT.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert_pixels(tmp_path / "deep.png", GRADIENT)
    Image.fromarray(GRADIENT.astype(np.int32) * 1000).save(tmp_path / "deeper.tif")
    assert_pixels(tmp_path / "deeper.tif", GRADIENT)
    values = GRADIENT.astype(np.float32) / 255 - 3
    values[0, 5] = np.nan
    values[0, 0], values[-1, -1] = -3, 0
    Image.fromarray(values).save(tmp_path / "float.tif")
    assert (
        read(tmp_path / "float.tif")[0, 0, 0] == 0
        and read(tmp_path / "float.tif")[0, -1, -1] == 255
    )


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (16, 12), (0, 100, 200, 0)).save(tmp_path / "clear.png")
    assert_pixels(tmp_path / "clear.png", (255, 255, 255))
    Image.new("RGBA", (16, 12), (0, 100, 200, 51)).save(tmp_path / "haze.webp", lossless=True)
    assert_pixels(tmp_path / "haze.webp", (204, 224, 244), tolerance=1)
    Image.new("LA", (16, 12), (10, 0)).save(tmp_path / "gray.png")
    assert_pixels(tmp_path / "gray.png", (255, 255, 255))
    Image.new("RGB", (16, 12), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    assert_pixels(tmp_path / "key.png", (255, 255, 255))
    image = Image.new("P", (16, 12), 1)
    image.putpalette([0, 0, 0, 50, 60, 70])
    image.save(tmp_path / "palette.gif", transparency=1)
    assert_pixels(tmp_path / "palette.gif", (255, 255, 255))


def test_the_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (16, 12), color) for color in ("red", "lime", "blue")]
    for name in ("moves.gif", "moves.png", "moves.webp"):
        options = dict(lossless=True) if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert_pixels(tmp_path / name, (255, 0, 0))


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, np.array),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_photographs_stand_upright_as_the_camera_noted(tmp_path, orientation, upright):
    image, exif = photograph(), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    assert_pixels(tmp_path / "turned.png", upright(np.asarray(image)))
    image.convert("L").save(tmp_path / "gray.png", exif=exif)
    assert_pixels(tmp_path / "gray.png", upright(np.asarray(image.convert("L"))[..., None]))


def test_broken_metadata_costs_no_photograph(tmp_path):
    image = photograph()
    image.save(tmp_path / "a.png", exif=b"Exif\0\0XX\0*\0\0\0\x08")
    assert_pixels(tmp_path / "a.png", np.asarray(image))


@pytest.mark.parametrize("height, width", [(1, 1), (1, 5000), (5000, 1)])
def test_tiny_and_thin_pictures_have_two_views(tmp_path, height, width):
    Image.new("RGB", (width, height), (10, 200, 90)).save(tmp_path / "thin.png")
    crops = samples_of(ImageFiles(tmp_path, np.array(["thin.png"])), 24)
    for sample in range(20):
        (views, boxes, _), failures = crops[sample]
        assert (
            failures == [] and torch.isfinite(boxes).all() and boxes.min() >= 0 and boxes.max() <= 1
        )
        assert (views.float() - torch.tensor([10.0, 200, 90])[:, None, None]).abs().max() <= 1


def test_odd_names(tmp_path):
    names = ["with space.jpg", "ümläut 漢字 🐙.jpg", "quote'\"%s{}.jpg", "new\nline.jpg"]
    for name in names:
        photograph().save(tmp_path / name)
    root, paths, _ = find_images(tmp_path)
    assert paths.tolist() == sorted(names)
    assert all(image.shape == (3, 12, 16) for image in ImageFiles(root, paths))


# -------------------------------------------------------------------------------------- no images


def png_that_claims(width, height):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def jpeg_bytes():
    buffer = io.BytesIO()
    photograph(200, 300).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "cut short": (lambda p: p.write_bytes(jpeg_bytes()[:9000]), "truncated"),
    "cut in its header": (lambda p: p.write_bytes(jpeg_bytes()[:40]), "[Tt]runcated"),
    "without a byte": (lambda p: p.touch(), "empty file"),
    "a page": (lambda p: p.write_text("<html>404</html>"), "not an image that Pillow knows"),
    "a bomb": (lambda p: p.write_bytes(png_that_claims(40_000, 40_000)), "exceeds limit .* bomb"),
    "half a bomb": (
        lambda p: p.write_bytes(png_that_claims(10_000, 9_500)),
        "exceeds limit .* bomb",
    ),
    "a folder": (lambda p: p.mkdir(), "a folder, not a file"),
    "a pipe": (lambda p: os.mkfifo(p), "not a regular file"),
    "a link to itself": (lambda p: p.symlink_to(p), "too many levels of symbolic links"),
    "a link to nothing": (lambda p: p.symlink_to(p.with_name("gone")), "no such file"),
    "garbage inside": (lambda p: p.write_bytes(png_that_claims(30, 30)), "."),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_named_with_the_reason(tmp_path, kind):
    make, reason = BAD[kind]
    make(tmp_path / "x.jpg")
    with pytest.raises(BadImage, match=f"^x.jpg: .*({reason})") as error:
        read(tmp_path / "x.jpg")
    assert (
        error.value.name == "x.jpg"
        and "\n" not in error.value.reason
        and str(tmp_path) not in error.value.reason
    )


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_what_may_not_be_read_is_named(tmp_path):
    photograph().save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").chmod(0)
    with pytest.raises(BadImage, match="permission denied"):
        read(tmp_path / "x.jpg")


def test_random_damage_ends_in_a_picture_or_in_badimage(tmp_path):
    rng, good = random.Random(0), jpeg_bytes()
    for number in range(150):
        damaged = bytearray(good[: rng.randrange(1, len(good))] if number % 2 else good)
        for _ in range(20):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "x.jpg").write_bytes(damaged)
        try:
            assert read(tmp_path / "x.jpg").shape[0] == 3
        except BadImage as bad:
            assert bad.reason


# --------------------------------------------------------------------------- in the middle of a run


def folder_with_bad(tmp_path, bad, count=9):
    for number in range(count):
        path = tmp_path / f"{number}.png"
        path.touch() if number in bad else Image.new("RGB", (16, 12), (number * 20,) * 3).save(path)
    return ImageFiles(tmp_path, np.array([f"{number}.png" for number in range(count)]))


def color(item):
    return round(item[0].views.float().mean().item() / 20)


def test_the_next_readable_neighbor_stands_in_and_all_on_the_way_are_named(tmp_path):
    crops = samples_of(folder_with_bad(tmp_path, {2, 3, 8}), 8)
    for index, stand_in, failed in [
        (1, 1, []),
        (2, 4, ["2.png", "3.png"]),
        (3, 4, ["3.png"]),
        (8, 0, ["8.png"]),
    ]:
        item = crops[9 + index]
        assert color(item) == stand_in and item[1] == [(name, "empty file") for name in failed]
        assert torch.equal(item[0].views, crops[9 + index][0].views)


def test_a_stand_in_has_the_luck_of_the_sample_and_not_of_its_own(tmp_path):
    crops = samples_of(folder_with_bad(tmp_path, {2}), 8)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert torch.equal(crops[2][0].boxes, samples_of(folder_with_bad(whole, {}), 8)[2][0].boxes)
    assert not torch.equal(crops[2][0].boxes, crops[3][0].boxes)


def test_a_file_that_disappears_while_training_is_replaced(tmp_path):
    images = folder_with_bad(tmp_path, {})
    loader = iter(make_loader(samples_of(images, 8), RunSampler(9, 3, stop=30), 1, "cpu"))
    assert next(loader)[1] == []
    (tmp_path / "4.png").unlink()
    failures = [failure for _, failed in loader for failure in failed]
    assert set(failures) == {("4.png", "no such file or directory")}


def test_nothing_but_bad_files_ends_the_run_with_one_of_them(tmp_path):
    with pytest.raises(
        ValueError, match=r"^3 images in a row could not be read; 0\.png: empty file$"
    ):
        samples_of(folder_with_bad(tmp_path, range(3), count=3), 8)[1]


def test_each_bad_file_is_written_once(tmp_path):
    skipped = Skipped(tmp_path / "skipped.txt", num_images=1000)
    skipped.record([])
    assert not (tmp_path / "skipped.txt").exists()
    skipped.record([("ä b.jpg", "empty file"), ("c.jpg", "truncated"), ("ä b.jpg", "empty file")])
    skipped.record([("c.jpg", "truncated")])
    skipped.record([("new\nline\t.jpg", "truncated")] * 2)
    skipped.record([("odd\u2028.jpg", "truncated")])
    expected = "ä b.jpg\tempty file\nc.jpg\ttruncated\n"
    expected += "new line .jpg\ttruncated\nodd\u2028.jpg\ttruncated\n"
    assert (tmp_path / "skipped.txt").read_text(encoding="utf-8") == expected
    Skipped(tmp_path / "skipped.txt", 1000).record(
        [("odd\u2028.jpg", "truncated"), ("c.jpg", "truncated")]
    )  # resumed
    assert (tmp_path / "skipped.txt").read_text(encoding="utf-8") == expected


def test_two_processes_name_a_file_once(tmp_path):
    one, other = (Skipped(tmp_path / "skipped.txt", 1000) for _ in range(2))
    one.record([("a.jpg", "empty file")])
    other.record([("a.jpg", "empty file"), ("b.jpg", "empty file")])
    one.record([("b.jpg", "empty file")])
    assert (tmp_path / "skipped.txt").read_text() == "a.jpg\tempty file\nb.jpg\tempty file\n"


def test_names_that_are_no_unicode_are_written_too(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    for _ in range(2):
        Skipped(tmp_path / "skipped.txt", 1000).record([(name, "empty file")])
    assert (tmp_path / "skipped.txt").read_bytes() == b"caf\xe9.jpg\tempty file\n"


def test_more_than_the_allowed_share_ends_the_run(tmp_path):
    skipped = Skipped(tmp_path / "skipped.txt", num_images=300)
    for number in range(3):  # 1 %: still allowed
        skipped.record([(f"{number}.jpg", "empty file")] * 5)
    with pytest.raises(
        ValueError,
        match=r"^4 of 300 images could not be read, more than .* 0.01 .*skipped\.txt; --check",
    ):
        skipped.record([("3.jpg", "empty file")])
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 4
    Skipped(tmp_path / "other.txt", 300, max_share=1).record(
        [(f"{n}.jpg", "empty file") for n in range(300)]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_checking_reads_every_file_and_reports(tmp_path, workers, capsys):
    images = folder_with_bad(tmp_path, {2, 5})
    photograph(40, 30).save(tmp_path / "7.png")
    assert report_check(images, workers) == 2
    assert capsys.readouterr().out.splitlines() == [
        "bad      2.png: empty file",
        "bad      5.png: empty file",
        "sizes    2 different, from 12 x 16 to 40 x 30 (height x width); most often 12 x 16, 6 "
        "times",
        "checked  9 images: 7 can be read, 2 cannot",
    ]
