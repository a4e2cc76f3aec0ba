"""measures/datasets.py: data sets whose every pixel has a label, each in its owner's layout."""

import hashlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from test_photographs import png_that_claims

import toy
from measures import datasets
from measures.datasets import open_labeled
from measures.layouts import COARSE_NAMES, FINE_TO_COARSE, FIRST_STUFF, IGNORE, LABELED, WRONG
from trained import write

Y, X = 24, 40


def rows(*ids, y=Y, x=X):
    """A label map (y x) whose upper rows have the first ids, one row each, the rest the last."""
    label = np.full((y, x), ids[-1])
    for row, number in enumerate(ids[:-1]):
        label[row] = number
    return label


def pair(image, label, ids, y=Y, x=X):
    """An image file and its label file."""
    write(image, np.full((y, x, 3), 90))
    write(label, rows(*ids, y=y, x=x))


def draw_voc(root):
    top = root / "VOCdevkit" / "VOC2012"
    for i, name in enumerate(("2007_01", "2008_02", "2011_03")):
        pair(top / f"JPEGImages/{name}.jpg", top / f"SegmentationClassAug/{name}.png", (255, i))
        write(top / f"SegmentationClass/{name}.png", rows(255, i + 1))
    lists = {"train_aug": "/JPEGImages/2007_01.jpg /SegmentationClassAug/2007_01.png\n2008_02\n",
             "train": "2007_01\n", "val": "2011_03\n\n"}  # fmt: skip
    (top / "ImageSets/Segmentation").mkdir(parents=True)
    for name, text in lists.items():
        (top / f"ImageSets/Segmentation/{name}.txt").write_text(text)


def draw_cityscapes(root):
    for part, city, i in (("train", "ulm", 0), ("train", "ulm", 1), ("val", "bonn", 0)):
        name = f"{part}/{city}/{city}_{i:06d}_000019"
        image = root / "leftImg8bit" / f"{name}_leftImg8bit.png"
        pair(image, root / "gtFine" / f"{name}_gtFine_labelIds.png", (33, 0, 9, 7))


def draw_ade20k(root):
    top = root / "ADEChallengeData2016"
    for part, i in (("training", 0), ("training", 1), ("validation", 7)):
        name = f"{part}/ADE_{i:08d}"
        pair(top / "images" / f"{name}.jpg", top / "annotations" / f"{name}.png", (0, 1, 150))


def draw_bsds(root):
    for part in ("val", "test"):
        pair(root / f"images/{part}/p.jpg", root / f"segments/{part}/p.png", (3, 77))


def draw_folder(root, ids=((0, 1), (255, 2)), part="day"):
    """An image per row of ids."""
    for i, each in enumerate(ids):
        pair(root / f"images/{part}/{i}.jpg", root / f"labels/{part}/{i}.png", each)
    return root


def draw_coco_stuff(root):
    """Three curated images out of order; one is too small, two have too little stuff."""
    fine = {"300": 91, "100": 181, "200": 100, "400": 91, "500": 0, "600": 91}
    for name, number in fine.items():
        y = 359 if name == "400" else 360
        label = root / f"stuffthingmaps_trainval2017/val2017/{name}.png"
        ids = (255,) * {"400": 80, "600": 91}.get(name, 90) + (number,)  # 3/4 of 360 rows: stuff
        pair(root / f"val2017/{name}.jpg", label, ids, y, 370)


DRAW = dict(voc=draw_voc, cityscapes=draw_cityscapes, ade20k=draw_ade20k, bsds=draw_bsds,
            folder=draw_folder, coco_stuff=draw_coco_stuff)  # fmt: skip


@pytest.mark.parametrize("dataset, split, names, classes, ids", [
    ("voc", None, ["2011_03.jpg"], 21, {3, 255}),
    ("voc", "train", ["2007_01.jpg"], 21, {1, 255}),
    ("voc", "train_aug", ["2007_01.jpg", "2008_02.jpg"], 21, {0, 255}),  # SegmentationClassAug
    ("cityscapes", "train", [f"ulm/ulm_00000{i}_000019_leftImg8bit.png" for i in (0, 1)], 19,
     {18, 255, 0}),  # bicycle, unlabeled and parking, road
    ("cityscapes", None, ["bonn/bonn_000000_000019_leftImg8bit.png"], 19, {18, 255, 0}),
    ("ade20k", "train", ["ADE_00000000.jpg", "ADE_00000001.jpg"], 150, {255, 0, 149}),
    ("ade20k", "val", ["ADE_00000007.jpg"], 150, {255, 0, 149}),
    ("bsds", None, ["p.jpg"], 0, {3, 77}),
    ("bsds", "test", ["p.jpg"], 0, {3, 77}),
    ("folder", None, ["day/0.jpg", "day/1.jpg"], 3, {0, 1}),
    ("coco_stuff", None, ["100.jpg", "200.jpg", "300.jpg"], 27, {255, 24}),  # solid: wood
])  # fmt: skip
def test_a_split_has_its_images_and_classes(tmp_path, dataset, split, names, classes, ids):
    DRAW[dataset](tmp_path)
    found = open_labeled(dataset, tmp_path, split)
    image, label = found[0]
    assert [found.images.paths[place] for place in found.places] == names
    assert len(found) == len(names)
    assert len(found.class_names) == len(set(found.class_names)) == classes
    assert set(label.unique().tolist()) == ids
    assert image.dtype == torch.uint8 and image.shape == (3, *label.shape)
    assert label.dtype == torch.long


@pytest.mark.parametrize("dataset", DRAW)
def test_what_is_missing_is_named_with_the_expected_tree_and_what_was_found(tmp_path, dataset):
    (tmp_path / "holiday").mkdir()
    for folder, words in ((tmp_path, "holiday/"), (None, "--data-dir is missing")):
        with pytest.raises(ValueError) as caught:
            open_labeled(dataset, folder)
        line = str(caught.value)
        assert LABELED[dataset].tree in line and words in line and "\n" not in line
    DRAW[dataset](tmp_path)
    file = open_labeled(dataset, tmp_path).label_of.args[0][0]
    file.unlink()
    with pytest.raises(ValueError, match=f"1 of .* labels are missing, first .*{file.name}"):
        open_labeled(dataset, tmp_path)


def test_a_missing_list_names_the_lists_there_are_and_a_listed_image_must_be_there(tmp_path):
    draw_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/JPEGImages/2008_02.jpg").unlink()
    missing = r"1 of 2 images are missing, first .*2008_02\.jpg"
    there = r"no .*trainval\.txt; .*: train\.txt, train_aug"
    for split, line in (("trainval", there), ("train_aug", missing)):
        with pytest.raises(ValueError, match=line):
            open_labeled("voc", tmp_path, split)


def test_the_tables_of_ids_are_those_of_their_protocols():
    sizes = [6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8, 2, 6, 4, 11, 4, 11, 7, 2, 6, 11, 9, 2, 6, 5, 5]
    fine = np.array(FINE_TO_COARSE)
    assert len(fine) == 256 and np.bincount(fine[:182], minlength=27).tolist() == sizes
    assert fine[255] == IGNORE and (fine[182:255] == WRONG).all()
    known = {71: "electronic", 0: "person", 16: "animal", 45: "kitchen", 181: "solid"}
    assert {number: COARSE_NAMES[fine[number]] for number in known} == known
    assert (fine[:91] < FIRST_STUFF).all() and (fine[91:182] >= FIRST_STUFF).all()
    evaluated = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    cities = LABELED["cityscapes"]
    assert [number for number, t in enumerate(cities.ids) if t != IGNORE] == evaluated
    assert cities.classes[cities.ids[26]] == "car" and cities.classes[cities.ids[11]] == "building"
    assert LABELED["voc"].classes[15] == "person" and LABELED["ade20k"].ids[0] == IGNORE


def test_the_published_list_is_recognized(tmp_path, monkeypatch):
    assert datasets.PUBLISHED_LIST.startswith("7c629734c88f1a74bba6")
    draw_coco_stuff(tmp_path)
    assert "NOT the published list of 2,175" in open_labeled("coco_stuff", tmp_path).notice
    digest = hashlib.sha256(b"100\n200\n300\n").hexdigest()
    monkeypatch.setattr(datasets, "PUBLISHED_LIST", digest)
    assert open_labeled("coco_stuff", tmp_path).notice == "curated images"


def turn(image, _label, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(image).save(image, exif=exif)


@pytest.mark.parametrize("spoil, message", [
    (lambda image, label: write(label, rows(0, x=X + 1)),
     rf"day/0\.jpg is {X} x {Y} but its label is {X + 1} x {Y}"),
    (lambda image, label: write(label, rows(0, 3)), r"label .*0\.png has id 3, .* its 3 classes"),
    (lambda image, label: write(label, np.zeros((Y, X, 3))), r"0\.png holds colors \(RGB\)"),
    (lambda image, label: label.write_text("x"), r"cannot read the label .*0\.png"),
    (lambda image, label: label.write_bytes(png_that_claims(13_600, 13_500)),
     r"cannot read the label .*0\.png: image size \(183600000 pixels\) exceeds limit"),
    (lambda image, label: Image.open(label).save(label, "JPEG"), r"0\.png is a JPEG, whose values"),
    *[(partial(turn, orientation=i), rf"day/0\.jpg: its EXIF orientation is {i}") for i in (3, 6)],
    (lambda image, label: image.write_bytes(b"\x89PNG no"), r"cannot read day/0\.jpg"),
])  # fmt: skip
def test_a_spoiled_image_or_label_is_named_in_one_line(tmp_path, spoil, message):
    draw_folder(tmp_path)
    spoil(tmp_path / "images/day/0.jpg", tmp_path / "labels/day/0.png")
    with pytest.raises(ValueError, match=message) as caught:
        open_labeled("folder", tmp_path, num_classes=3)[0]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids, contents, names", [
    ((0, 2, 255, 1), b"", ("class 0", "class 1", "class 2")),  # ids are counted
    ((0, 255, 300, 300), b"\n \n", tuple(f"class {t}" for t in range(301))),  # of 16 bits
    ((0, 1), b"\xef\xbb\xbfsky\r\nsea \r\n\n \n", ("sky", "sea")),  # no mark, no blank line
    ((0, 1), "пляж\nsea".encode(), ("пляж", "sea")),
    (range(168), "\n".join(map(str, range(168))).encode(), tuple(map(str, range(168)))),
    ((0, 1), b"sky\n\nsand\n", "line 2 is blank, or its name stands there twice"),
    ((0, 1), b"a\nb\nb \nc", "line 3 is blank, or its name stands there twice"),
    ((0, 255), b"a\nb", "hold only 0 and 255; 255 is no class, and of one class every score is"),
    ((255, 7), b"", "hold only 7 and 255"),
    ((255,), b"", "hold only 255"),
    (range(168), b"", r"168 ids occur .* 167 first in .*png: name them in classes\.txt"),
])  # fmt: skip
def test_a_folder_names_its_classes_or_its_ids_are_counted(tmp_path, ids, contents, names):
    draw_folder(tmp_path, [ids[i : i + Y] for i in range(0, len(ids), Y)])
    (tmp_path / "classes.txt").write_bytes(contents)
    if isinstance(names, str):
        with pytest.raises(ValueError, match=names):
            open_labeled("folder", tmp_path)
    else:
        assert open_labeled("folder", tmp_path).class_names == names


def test_a_folder_without_parts_is_split_into_fifths_that_share_no_image(tmp_path):
    draw_folder(tmp_path, [(0, 1)] * 11)
    train, val = (open_labeled("folder", tmp_path, split) for split in ("train", "val"))
    assert sorted(train.places + val.places) == list(range(11)) and val.places == [0, 5, 10]
    assert len(open_labeled("folder", tmp_path)) == 11 == len(train.files() | val.files())
    draw_folder(tmp_path, [(0, 1)] * 7, "train")
    with pytest.raises(ValueError, match=r"no .*images/val; .*: day/, train/"):
        open_labeled("folder", tmp_path, "val")  # it would share images with train
    assert len(open_labeled("folder", tmp_path)) == 18  # to measure on everything


def test_toy_scenes_come_with_their_own_truth_and_from_seeds_no_run_has():
    found = open_labeled("toy", None, count=3, size=32)
    image, label = found[2]
    scene = toy.scene(datasets.UNSEEN, 2, size=32)
    assert (image.numpy() == scene.image.transpose(2, 0, 1)).all()
    assert (label.numpy() == scene.semantic).all() and datasets.UNSEEN > 2**31
    assert not open_labeled("toy", None, "train", count=3, size=32)[2][0].equal(image)
    assert found.files() == set()
