"""engine/images.py: images are found in any folder, some are held out, a subset is chosen."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import images
from engine.images import Photographs, choose_subset, find_images, open_images


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6), (200, 100, 50)).save(root / name, format="PNG")
    return root


def found(data_dir, layout="folder", **options):
    """The paths that are found, of which each can be read."""
    root, paths, _ = find_images(data_dir, layout, **options)
    assert all(image.pixels().image.shape == (3, 6, 9) for image in Photographs(root, paths))
    return paths.tolist()


COCO = "train2017/b.jpg train2017/a.jpg val2017/c.jpg train2017/deep/d.jpg train2017/.hidden.jpg"
COCOPLUS = "unlabeled2017/z.jpg train2017/b.jpg test2017/c.jpg"
IMAGENET = "train/n02/b.JPEG train/n01/c.JPEG train/stray.jpg val/n01/d.JPEG train/n01/deep/e.JPEG"
BDD = "images/100k/train/b.jpg images/100k/val/v.jpg images/100k/test/a.jpg images/10k/train/x.jpg"
FOLDER = "b.jpg a.PNG x/y/z.webp grüße/Füssen1.jpeg .hidden/h.jpg ._a.jpg"


@pytest.mark.parametrize("layout, there, expected", [
    ("coco", COCO, "train2017/a.jpg train2017/b.jpg"),
    ("cocoplus", COCOPLUS, "train2017/b.jpg unlabeled2017/z.jpg"),
    ("imagenet", IMAGENET, "train/n01/c.JPEG train/n02/b.JPEG"),
    ("bdd100k", BDD, "images/100k/test/a.jpg images/100k/train/b.jpg"),
    ("folder", FOLDER, "a.PNG b.jpg grüße/Füssen1.jpeg x/y/z.webp"),
])  # fmt: skip
def test_each_layout_finds_its_images_sorted(tmp_path, layout, there, expected):
    tree(tmp_path, *there.split())
    assert found(tmp_path, layout) == expected.split()
    assert find_images(tmp_path, layout)[::2] == (tmp_path, f"{tmp_path}, layout {layout}")


def test_what_is_left_out_is_counted_and_named(tmp_path):
    names = "a.jpg b.JFIF c.jpe IMG_2.HEIC IMG_1.heic sub/notes.txt"
    tree(tmp_path / "phone", *names.split())
    tree(tmp_path / "phone", "@eaDir/a.jpg/THUMB.jpg", "folder.jpg/d.png", ".x/y.heic")
    root, paths, notice = find_images(tmp_path / "phone")
    assert paths.tolist() == ["a.jpg", "b.JFIF", "c.jpe", "folder.jpg/d.png"]
    left = "left out: 2 .heic (first IMG_1.heic), 1 .txt (first sub/notes.txt)"
    assert notice == f"{root}, layout folder; {left}"
    tree(tmp_path / "net", "train/n1/a.jpg", "train/n2/images/b.jpg", "train/n3/n3.tar")
    notice = find_images(tmp_path / "net", "imagenet")[2]
    assert "2 folders without an image (first train/n2), 1 .tar (first train/n3/n3.tar)" in notice


def test_odd_names_are_found_from_anywhere(tmp_path, monkeypatch):
    folder = tmp_path / "[a]*"
    names = ["with space.jpg", "ümläut 漢字 🐙.jpg", "quote'\"%s{}[*].jpg", "new\nline.jpg"]
    monkeypatch.chdir(tree(folder, "train/[b]/c.jpg", *names))
    for given in (folder, ".", "../[a]*", Path("../[a]*/")):
        assert found(given) == sorted(["train/[b]/c.jpg", *names])
        assert found(given, "imagenet") == ["train/[b]/c.jpg"]


def test_a_list_names_images_absolutely_or_from_its_own_folder(tmp_path):
    tree(tmp_path / "sets", "b.jpg", "x/a b.jpg", "#1.jpg")
    tree(tmp_path / "far", "c.jpg")
    far, file = f"{tmp_path}/far/c.jpg", tmp_path / "sets" / "list.txt"
    text = f"\ufeffx/a b.jpg\n# a remark\n#\n\n  b.jpg \r\n./b.jpg\n#1.jpg\n{far}\n"
    file.write_text(text, encoding="utf-8")
    for layout in ("folder", "coco"):  # a file is a list, whatever the layout
        assert found(file, layout) == ["#1.jpg", far, "b.jpg", "x/a b.jpg"]


def test_links_are_followed_and_each_folder_is_entered_once(tmp_path):
    tree(tmp_path / "elsewhere", "far.jpg")
    tree(tmp_path / "set", "a.jpg", "sub/b.jpg")
    for name in ("linked", "sub/again", "twice"):  # the shallowest and first name is taken
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "sub" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "nowhere").symlink_to(tmp_path / "set" / "nowhere")
    assert found(tmp_path / "set") == ["a.jpg", "linked/far.jpg", "sub/b.jpg"]


def test_the_figures_of_a_run_inside_the_folder_are_no_photographs(tmp_path):
    tree(tmp_path, "a.jpg", "runs/one/groups.png")
    for name in ("config.json", "log.jsonl"):
        (tmp_path / name).touch()  # the folder that was asked for is not left out
        (tmp_path / "runs" / "one" / name).touch()
    assert found(tmp_path) == ["a.jpg"]
    (tmp_path / "runs" / "one" / "log.jsonl").unlink()  # then it is a folder like any other
    assert found(tmp_path) == ["a.jpg", "runs/one/groups.png"]


def test_another_layout_is_taken_as_a_plain_folder_only_where_that_is_allowed(tmp_path):
    tree(tmp_path, "mine/a.jpg", "train/b.jpg")
    notice = f"{tmp_path} is not laid out as cocoplus: taken as a plain folder of images"
    assert find_images(tmp_path, "cocoplus", strict=False)[2] == notice
    assert found(tmp_path, "cocoplus", strict=False) == ["mine/a.jpg", "train/b.jpg"]
    words = "of a known kind in .*; .* cocoplus has them in train2017 and unlabeled2017; found in"
    with pytest.raises(ValueError, match=rf"{words} {tmp_path}: mine/, train/$"):
        find_images(tmp_path, "cocoplus")
    tree(tmp_path, "train2017/c.jpg")  # a part of the layout is there
    lacks = f"no images in {tmp_path}/unlabeled2017, which the layout cocoplus has"
    with pytest.raises(ValueError, match=lacks):
        find_images(tmp_path, "cocoplus", strict=False)


MANY, NONE = " ".join(f"{number}.jpg" for number in range(40)), b"\xff\xfe\0\x81"


@pytest.mark.parametrize("there, contents, asked, words", [
    ("", b"", "", r"no images of a known kind in [^;]*; found in .*: nothing"),
    ("a.c b.c c.c d.c e.c f.c g.c", b"", "", "found in .*: a.c, .*, f.c and 1 more"),
    ("0.txt", b"", "x/y", "no such folder: .*x/y; found in .*: 0.txt$"),
    ("0.txt", b"", "0.txt", "no images of a known kind in .*0.txt"),
    ("0.jpg", b"", "", r"none of 1 images tried in .* can be read; 0.jpg: empty file$"),
    (MANY, b"", "", r"none of 14 images tried in .* can be read; \d+.jpg: empty file$"),
    ("a.txt", NONE, "a.txt", "a.txt is not a text file"),
    ("a.jpg", NONE, "a.jpg", "a.jpg is an image: give its folder"),
])  # fmt: skip
def test_a_wrong_path_is_answered_in_one_line(there, contents, asked, words, tmp_path):
    for name in there.split():
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=words) as error:
        find_images(tmp_path / asked)
    assert "\n" not in str(error.value)


def in_classes(*counts):
    return np.array([f"class {c}/{i:03d}.jpg" for c, n in enumerate(counts) for i in range(n)])


def counts_of(paths):
    return [sum(path.startswith(f"class {c}/") for path in paths) for c in range(4)]


def test_a_subset_is_uniform_over_classes_or_follows_a_pareto_distribution_of_power_6():
    """The others give what a class lacks."""
    paths, how = choose_subset(in_classes(50, 50, 3, 50), 40, seed=0)
    counts = counts_of(paths)
    assert sorted(counts) == [3, 12, 12, 13] and counts[2] == 3
    assert how == "uniform over 4 folders (3 to 13 each)"
    assert len(set(paths)) == 40 and paths.tolist() == sorted(paths)
    paths, how = choose_subset(in_classes(900, 900, 900, 900), 400, seed=0, long_tailed=True)
    quantiles = [(1 - q) ** (-1 / 6) - 1 for q in (0.125, 0.375, 0.625, 0.875)]
    expected = [400 * q / sum(quantiles) for q in quantiles]
    assert sorted(counts_of(paths)) == [pytest.approx(x, abs=2) for x in expected]
    assert "long-tailed over 4 folders" in how


def test_a_subset_is_a_function_of_the_seed_and_without_classes_random():
    flat = np.array([f"{i:03d}.jpg" for i in range(100)])
    for there in (flat, in_classes(30, 40, 30)):
        one, again, other = (choose_subset(there, 30, seed)[0].tolist() for seed in (1, 1, 2))
        assert one == again != other and len(set(one)) == 30 and one != there[:30].tolist()
    with pytest.raises(ValueError, match="--subset 101, but there are 100 images"):
        choose_subset(flat, 101, 0)


def test_a_run_learns_from_a_subset_of_what_is_not_held_out_a_tenth_at_most(tmp_path):
    tree(tmp_path, *(f"{i:02d}.jpg" for i in range(30)))
    chosen, out, about = open_images(tmp_path, "coco", strict=False, subset=20, held_out=64, seed=1)
    assert len(chosen) == 20 and len(out) == 3 and not set(chosen.paths) & set(out.paths)
    assert out[0].shape == chosen[0].shape == chosen[0].pixels().image.shape == (3, 6, 9)
    assert about.startswith("30 images: ") and "taken as a plain folder" in about
    words = "; 3 are kept out for the result, a tenth at most instead of 64; 20 of them are chosen"
    assert f"{words}, uniform over" in about
    one, other = (open_images(tmp_path, held_out=3, seed=seed) for seed in (1, 2))
    assert one[1].paths.tolist() == out.paths.tolist() != other[1].paths.tolist()
    assert sorted([*one[0].paths, *out.paths]) == found(tmp_path)
    assert open_images(tmp_path)[2] == f"30 images: {tmp_path}, layout folder"


@pytest.mark.parametrize("data_dir, output, refused", [
    (".", ".", True), (".", "linked", True), ("a/list.txt", "a/b", True),
    (".", "a", True), ("a/list.txt", "a", False), (".", "a/run", False),
])  # fmt: skip
def test_no_results_are_written_among_the_images(data_dir, output, refused, tmp_path):
    tree(tmp_path, "a/b/c.jpg")
    (tmp_path / "linked").symlink_to("a/b")
    (tmp_path / "a" / "list.txt").write_text("b/c.jpg")
    line = f"--output-dir {tmp_path / output} holds the images: give another folder"
    with pytest.raises(ValueError, match=line) if refused else nullcontext():
        open_images(tmp_path / data_dir, output_dir=str(tmp_path / output))


@pytest.mark.parametrize("folders, ends, places", [
    ("V/JPEGImages V/SegmentationClass", ".jpg .png", "3 of SegmentationClass"),
    ("leftImg8bit/train/ulm gtFine/train/ulm", "_leftImg8bit.png _gtFine_labelIds.png",
     "3 of gtFine"),
    ("images/training annotations/training", ".jpg .png", "3 of annotations"),
    ("x x", ".jpg _mask.png", "3 of _mask.png"),
    ("A Labels GT", ".png .png .bmp", "3 of GT, 3 of Labels"),
    ("V/SegmentationClass masks", ".png .png", ""),  # all of them: this was asked for
    ("a b unlabeled2017 landmarks", ".jpg .png .jpg .jpg", ""),
])  # fmt: skip
def test_label_maps_beside_photographs_are_a_warning(folders, ends, places, tmp_path):
    pairs = list(zip(folders.split(), ends.split()))
    tree(tmp_path, *(f"{folder}/a_{i}{end}" for folder, end in pairs for i in range(3)))
    about = f"{3 * len(pairs)} images: {tmp_path}, layout folder"
    advice = ": give the folder of the photographs, or a list, as --data-dir"
    expected = f"\nwarning  label maps? {places}{advice}" if places else ""
    assert open_images(tmp_path)[2] == about + expected


def test_a_digest_is_of_all_names_in_their_order():
    lists = [["a", "b"], ["b", "a"], ["ab"], [os.fsdecode(b"\xe8")], [os.fsdecode(b"\xe9")]]
    assert len({images.digest_of(names) for names in lists}) == 5
    assert images.digest_of(np.array(["a", "b"])) == images.digest_of(["a", "b"])
