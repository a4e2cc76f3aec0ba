"""evaluate.py masks: the groups of photographs as files that any labeling tool opens."""

import errno
import fcntl
import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import ExifTags, Image

import evaluate
from engine.images import find_images
from measures import masks
from measures.groups import segment
from measures.networks import open_network
from trained import K, save_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "last.pth")


@pytest.fixture
def photos(tmp_path):
    """One of each kind: wide, turned by its camera, gray, CMYK and named as the sheet, broken."""
    folder, rng = tmp_path / "photos", np.random.default_rng(5)
    (folder / "deep").mkdir(parents=True)
    drawn = lambda y, x: Image.fromarray(rng.integers(0, 256, (y // 8, x // 8, 3), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying, 48 x 90; upright it is 90 x 48
    drawn(64, 160).resize((160, 64)).save(folder / "a.png")
    drawn(48, 88).resize((90, 48)).save(folder / "turned.jpg", exif=exif)
    drawn(64, 64).resize((64, 64)).convert("L").save(folder / "gray.png")
    drawn(64, 64).resize((70, 64)).convert("CMYK").save(folder / "contact_sheet.jpg")
    drawn(64, 64).resize((64, 64)).save(folder / "deep" / "a.png")
    drawn(64, 64).resize((64, 64)).save(folder / "a.bmp")
    drawn(64, 64).resize((64, 64)).save(folder / "a.png.jpg")
    (folder / "broken.jpg").write_text("no image")
    return folder


SIZES = {  # (x, y) of each mask
    "a.png.png": (160, 64), "turned.png": (48, 90), "gray.png": (64, 64),
    "contact_sheet.png": (70, 64), "deep/a.png": (64, 64), "a.bmp.png": (64, 64),
    "a.png.jpg.png": (64, 64),
}  # fmt: skip


def run(*words, status=0):
    assert evaluate.main(["masks", *map(str, words)]) == status


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_every_photograph_has_an_upright_palette_image(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "masks"
    run(checkpoint, photos, "--output", out, "--size", 64, "--json", tmp_path / "r.json")
    text = capsys.readouterr()
    assert "7 photographs have a mask" in text.out and "left out broken.jpg" in text.err
    for name, size in SIZES.items():
        with Image.open(out / name) as mask:
            assert (mask.size, mask.mode) == (size, "P") and np.asarray(mask).max() < K
    assert {f for f in contents(out) if f.endswith(".png")} == {*SIZES}
    shares = json.loads((tmp_path / "r.json").read_text())["photos"]
    with Image.open(out / "turned.png") as mask:
        counts = np.bincount(np.asarray(mask).ravel(), minlength=K) / (48 * 90)
    found = [shares["turned.jpg"].get(str(k), 0) for k in range(K)]
    assert found == pytest.approx(counts.tolist(), abs=1e-5)


@pytest.mark.parametrize("given", [".", "gray.png", "../list.txt"])
@pytest.mark.parametrize("output", [".", "deep", "../links", ".."])
def test_masks_in_a_folder_that_holds_images_are_refused(given, output, checkpoint, photos, capsys):
    (photos / "../list.txt").write_text(f"{photos}/deep/a.png")
    (photos / "../links").mkdir()
    (photos / "../links/gray.png").symlink_to(photos / "gray.png")
    before = contents(photos / "..")
    run(checkpoint, photos / given, "--output", photos / output, status=2)
    assert "masks need a folder of their own" in capsys.readouterr().err
    assert contents(photos / "..") == before


def test_masks_in_a_new_folder_inside_are_not_taken_for_photographs(checkpoint, photos, capsys):
    for _ in range(2):
        run(checkpoint, photos, "--output", photos / "deep/masks", "--size", 64)
        assert "7 photographs have a mask" in capsys.readouterr().out
    assert len(find_images(photos)[1]) == 8


def test_ids_are_those_of_the_segmentation_that_is_measured(checkpoint, photos, tmp_path):
    run(checkpoint, photos / "deep", photos / "gray.png", "--output", tmp_path / "m", "--size", 64)
    pixels = torch.from_numpy(np.array(Image.open(photos / "deep" / "a.png"))).permute(2, 0, 1)
    mask = np.asarray(Image.open(tmp_path / "m" / "deep" / "a.png"))
    assert np.array_equal(mask, segment(open_network(checkpoint)[0], pixels[None])[0][0].numpy())


def test_prototypes_are_described_beside_the_sheet(checkpoint, photos, tmp_path, monkeypatch):
    out, sheets = tmp_path / "m", []
    monkeypatch.setattr(masks, "save", lambda figure, *_: sheets.append(figure))
    (tmp_path / "names.txt").write_text("0 sky\n\n3 the ground\n")
    given = "--output", out, "--size", 64, "--names", tmp_path / "names.txt"
    run(checkpoint, photos, *given)
    found = json.loads((out / "prototypes.json").read_text())
    assert [p["prototype"] for p in found] == list(range(K))
    assert [p["name"] for p in found] == ["sky", "", "", "the ground", ""]
    assert sum(p["share"] for p in found) == pytest.approx(1, abs=1e-4)
    for p in found:
        near = [segment["similarity"] for segment in p["nearest"]]
        assert near == sorted(near, reverse=True) and len(near) == min(p["images"], 5)
    with Image.open(out / "gray.png") as mask:
        assert json.loads(mask.text["slotcon"])["names"] == {"0": "sky", "3": "the ground"}
        palette = bytes(mask.getpalette()).hex()
    assert [p["color"] for p in found] == [f"#{palette[6 * k : 6 * k + 6]}" for k in range(K)]
    (legend,) = sheets[0].legends
    shown = zip(legend.get_texts(), legend.get_patches())
    shown = [(text.get_text(), to_hex(patch.get_facecolor())) for text, patch in shown]
    used = sorted((p for p in found if p["images"]), key=lambda p: -p["share"])
    assert shown == [(f"{p['prototype']} {p['name']}", p["color"]) for p in used]


def test_stopped_and_started_again_it_ends_the_same(checkpoint, photos, tmp_path, monkeypatch):
    run(checkpoint, photos, "--output", tmp_path / "whole", "--size", 64)
    run(checkpoint, photos, "--output", tmp_path / "parts", "--size", 96)
    plain, calls = masks.write_mask, []

    def write(*given):
        calls.append(plain(*given))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(masks, "write_mask", write)
    run(checkpoint, photos, "--output", tmp_path / "parts", "--size", 64, status=130)
    assert not {f for f in find_images(tmp_path)[1] if f.startswith("parts")}  # no photographs
    assert json.loads((tmp_path / "parts" / "prototypes.json").read_text()) == []  # of two sizes
    monkeypatch.setattr(masks, "write_mask", plain)
    run(checkpoint, photos, "--output", tmp_path / "parts", "--size", 64)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_another_network_size_names_or_photo_make_other_masks(checkpoint, photos, tmp_path, capsys):
    out, file = ["--output", tmp_path / "m"], photos / "gray.png"
    names, seen = tmp_path / "names.txt", []
    names.write_text("0 sky\n")
    other = torch.load(checkpoint)
    other["model"]["teacher.backbone.1.bias"] += 1  # prototypes are the same
    torch.save(other, tmp_path / "other.pth")
    first = [checkpoint, file, "--size", 64]
    for given in (first, first, [checkpoint, file, "--size", 96],
                  [checkpoint, file, "--size", 96, "--names", names],
                  [tmp_path / "other.pth", file, "--size", 96, "--names", names]):  # fmt: skip
        if len(seen) == 2:
            shutil.copy(photos / "deep" / "a.png", file)
        for _ in range(2):
            run(*given, *out)
            seen.append(contents(tmp_path / "m")["gray.png"])
        said = capsys.readouterr().out
        assert ("\n1 masks of another network, size, names" in said) == (len(seen) > 2)
        assert said.count("\n1 of 1 masks are there") == 1
    assert seen[::2] == seen[1::2] and len(set(seen)) == 5
    run(checkpoint, photos / "a.png", *out)
    assert f"1 other files .png in {tmp_path}/m are not of these" in capsys.readouterr().out
    names.write_text("5 sky\n")
    shutil.copy(photos / "a.png", tmp_path / "m" / "gray.png")  # a label, say
    for given, complaint in (
        ([photos, *out, "--names", names], "'5 sky': expected a prototype from 0 to 4"),
        ([file, "--output", names], f"cannot write {names}/prototypes.json: give another"),
        ([file, *out], "m/gray.png is no mask of this program: give another"),
        ([tmp_path / "no.jpg", *out], "no such folder"),
    ):
        run(checkpoint, *given, status=2)
        assert complaint in capsys.readouterr().err


def test_where_no_photograph_can_be_read_one_line_says_so(checkpoint, photos, tmp_path, capsys):
    run(checkpoint, photos / "broken.jpg", "--output", tmp_path / "masks", status=2)
    assert "none of the photographs can be read" in capsys.readouterr().err


def test_masks_of_two_programs_at_once_are_refused(checkpoint, photos, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=BlockingIOError(errno.EAGAIN, "")))
    run(checkpoint, photos, "--output", photos / "../masks", status=2)
    assert "masks is in use by another process: wait for it" in capsys.readouterr().err


def test_what_a_killed_run_left_is_removed(checkpoint, photos, tmp_path):
    left = tmp_path / "masks" / "deep" / ".a.png.77.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    run(checkpoint, photos, "--output", tmp_path / "masks", "--size", 64)
    assert not left.exists() and (left.parent / "a.png").exists()
