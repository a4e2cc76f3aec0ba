"""Labeled data in the owners' layouts, what a step sees of it, and what the scores are.

downstream/datasets.py, views.py, scores.py. The trees are drawn here; COCO's fifty images come from
the folder that SLOTCON_TINY_COCO names.
"""

import contextlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as encoding
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from downstream import scores
from downstream.datasets import (
    CITYSCAPES,
    CocoObjects,
    Packed,
    Training,
    mask_of,
    open_segmentation,
    some_of,
)
from downstream.views import (
    GRAY,
    CropView,
    ObjectView,
    black_objects,
    black_pixels,
    distorted,
    objects,
    saturated,
)
from engine.images import BadImage
from measures.labels import Labeled
from measures.metrics import IGNORE

TINY_COCO = os.environ.get("SLOTCON_TINY_COCO")
needs_coco = pytest.mark.skipif(not TINY_COCO, reason="SLOTCON_TINY_COCO names no folder")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def photo(seed, y=24, x=40):
    return np.random.default_rng(seed).integers(0, 256, (y, x, 3))


# ------------------------------------------------------------------------ trees


def draw_voc(root):
    top = root / "VOCdevkit" / "VOC2012"
    for i, name in enumerate(("2007_01", "2008_02", "2011_03")):
        save(top / "JPEGImages" / f"{name}.jpg", photo(i))
        label = np.full((24, 40), i)
        label[0] = 255  # the border between objects
        save(top / "SegmentationClassAug" / f"{name}.png", label)
        save(top / "SegmentationClass" / f"{name}.png", label + (label < 255))
    lists = top / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train_aug.txt").write_text("2007_01\n2008_02\n")
    (lists / "train.txt").write_text("2007_01\n")
    (lists / "val.txt").write_text("2011_03\n")
    return top


def draw_cityscapes(root):
    for part, city, count in (("train", "ulm", 2), ("train", "bonn", 1), ("val", "lindau", 1)):
        for i in range(count):
            name = f"{city}_{i:06d}_000019"
            save(root / "leftImg8bit" / part / city / f"{name}_leftImg8bit.png", photo(i))
            label = np.full((24, 40), 7)  # road
            label[:3], label[3:6], label[6:9] = 33, 0, 9  # bicycle, unlabeled, parking
            save(root / "gtFine" / part / city / f"{name}_gtFine_labelIds.png", label)
    return root


def draw_ade20k(root):
    top = root / "ADEChallengeData2016"
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            name = f"ADE_{part[:5]}_{i:08d}"
            save(top / "images" / part / f"{name}.jpg", photo(i))
            label = np.full((24, 40), 150)
            label[:5], label[5:9] = 0, 1
            save(top / "annotations" / part / f"{name}.png", label)
    return top


def draw_folder(root):
    for i in range(6):
        save(root / "images" / f"{i}.png", photo(i))
        save(root / "labels" / f"{i}.png", np.full((24, 40), i % 3))
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    return root


def test_voc_learns_from_the_augmented_list_and_tests_on_val(tmp_path):
    top = draw_voc(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", top):
        seen, unseen = (open_segmentation("voc", root, part) for part in ("train", "val"))
        assert (len(seen), len(unseen), len(seen.class_names)) == (2, 1, 21)
    image, label = seen[1]
    assert image.shape == (3, 24, 40) and label[0].eq(IGNORE).all() and label[1:].eq(1).all()
    assert unseen[0][1][1:].eq(3).all()  # of SegmentationClass, whose number here is one more
    plain = open_segmentation("voc", top, "train", train_list="train")
    assert len(plain) == 1 and plain[0][1][1:].eq(1).all()
    lists = top / "ImageSets" / "Segmentation"
    (lists / "train_aug.txt").rename(lists / "trainaug.txt")
    (lists / "trainaug.txt").write_text("/JPEGImages/2008_02.jpg /SegmentationClassAug/2008_02.png")
    assert len(open_segmentation("voc", top, "train")) == 1


def test_cityscapes_has_19_classes_and_everything_else_is_ignored(tmp_path):
    root = draw_cityscapes(tmp_path)
    seen, unseen = (open_segmentation("cityscapes", root, part) for part in ("train", "val"))
    assert (len(seen), len(unseen), len(seen.class_names)) == (3, 1, 19)
    assert [seen.images.name(i)[:4] for i in range(3)] == ["bonn", "ulm/", "ulm/"]
    label = seen[0][1]
    assert label[:3].eq(18).all() and label[3:9].eq(IGNORE).all() and label[9:].eq(0).all()
    assert seen.class_names[18] == "bicycle" and seen.class_names[0] == "road"


def test_cityscapes_numbers_are_those_of_its_table():
    """labelIds of the 19 evaluated classes, as cityscapesscripts/helpers/labels.py has them."""
    ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    assert tuple(CITYSCAPES.values()) == ids
    assert list(CITYSCAPES)[10:15] == ["sky", "person", "rider", "car", "truck"]


def test_ade20k_ignores_label_0_and_begins_at_1(tmp_path):
    top = draw_ade20k(tmp_path)
    for root in (tmp_path, top):
        seen, unseen = (open_segmentation("ade20k", root, part) for part in ("train", "val"))
        assert (len(seen), len(unseen), len(seen.class_names)) == (3, 2, 150)
    label = seen[2][1]
    assert label[:5].eq(IGNORE).all() and label[5:9].eq(0).all() and label[9:].eq(149).all()
    save(top / "annotations" / "training" / "ADE_train_00000001.png", np.full((24, 40), 151))
    with pytest.raises(ValueError, match=r"00000001.png has id 151, which is no class"):
        seen[1]


def test_a_folder_keeps_every_fifth_image_for_testing(tmp_path):
    root = draw_folder(tmp_path)
    seen, unseen = (open_segmentation("folder", root, part) for part in ("train", "val"))
    assert [seen.images.name(i) for i in seen.indices] == ["1.png", "2.png", "3.png", "4.png"]
    assert len(unseen) == 2 and seen.class_names == ("sky", "sea", "sand")


def test_toy_scenes_to_learn_from_are_not_those_to_test_on():
    seen, unseen = (open_segmentation("toy", "", part, scenes=3) for part in ("train", "val"))
    assert (len(seen), len(unseen)) == (3, 256)
    assert not torch.equal(seen[0][0], unseen[0][0])


@pytest.mark.parametrize("dataset", ["voc", "cityscapes", "ade20k", "folder", "coco"])
@pytest.mark.parametrize("there", ["nothing", "other"])
def test_a_wrong_tree_says_what_was_expected_and_what_was_found(dataset, there, tmp_path):
    root = tmp_path / "absent" if there == "nothing" else tmp_path
    (tmp_path / "holiday").mkdir()
    opened = CocoObjects if dataset == "coco" else open_segmentation
    arguments = (root, "train", True, False) if dataset == "coco" else (dataset, root, "train")
    with pytest.raises(ValueError) as caught:
        opened(*arguments)
    said = str(caught.value)
    expected = {"voc": "train_aug", "cityscapes": "gtFine/{train,val}/CITY",
                "ade20k": "annotations/", "folder": "labels as PNG",
                "coco": "annotations/instances_"}[dataset]  # fmt: skip
    assert f"--dataset {dataset} expects in --data-dir: " in said and expected in said
    assert f"found in {tmp_path}: holiday/" in said and "\n" not in said


def test_missing_labels_are_counted_and_the_first_is_named(tmp_path):
    top = draw_ade20k(tmp_path)
    for i in (1, 2):
        (top / "annotations" / "training" / f"ADE_train_{i:08d}.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 labels are missing, first .*00000001.png"):
        open_segmentation("ade20k", top, "train")
    draw_voc(tmp_path / "v")
    top = tmp_path / "v" / "VOCdevkit" / "VOC2012"
    (top / "JPEGImages" / "2008_02.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images are missing, first .*2008_02.jpg"):
        open_segmentation("voc", top, "train")
    (top / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    with pytest.raises(ValueError, match="--train-list train takes VOC's own 1,464"):
        open_segmentation("voc", top, "train")


def test_some_labeled_images_are_a_random_few_the_same_for_the_same_seed():
    assert some_of(9, 0, seed=3) == list(range(9))
    few = some_of(500, 20, seed=3)
    assert len(set(few)) == 20 and few == sorted(few) == some_of(500, 20, seed=3)
    assert few != some_of(500, 20, seed=4)
    with pytest.raises(ValueError, match="--labeled 10, but there are 9"):
        some_of(9, 10, seed=0)


def test_a_label_that_cannot_be_used_is_a_bad_image_for_the_loader(tmp_path):
    root = draw_folder(tmp_path)
    training = Training(open_segmentation("folder", root, "train"))
    save(root / "labels" / "2.png", np.full((24, 40), 77))
    assert training[0][0].shape == (3, 24, 40) and len(training) == 4
    with pytest.raises(BadImage, match="the label of 2"):
        training[1]


# ------------------------------------------------------------------------ views


def gradient(y, x):
    """An image whose colors say where a pixel was, and a label: its right half."""
    rows, columns = np.mgrid[:y, :x]
    image = np.stack([rows * 255 // (y - 1), columns * 255 // (x - 1), 0 * rows])
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(
        (columns >= x / 2).astype(int)
    )


def test_a_crop_without_any_change_of_size_is_cut_from_image_and_label_alike():
    image, label = gradient(50, 70)
    image[2] = label * 200
    for seed in range(20):
        crop, marks = CropView(16, scale=(1, 1), most=1)((image, label), random.Random(seed))
        assert crop.shape == (3, 16, 16) and marks.shape == (16, 16) and marks.dtype == torch.int64
        assert torch.equal(crop[2].long(), marks * 200)
        places = {tuple(p) for p in crop.flatten(1).T.tolist()}
        assert places <= {tuple(p) for p in image.flatten(1).T.tolist()}


def test_a_crop_is_mirrored_half_of_the_time_and_drawn_by_the_generator_alone():
    pair = gradient(50, 70)
    view = CropView(16, scale=(0.5, 2), distort=True)
    crops = [view(pair, random.Random(seed)) for seed in range(60)]
    mirrored = sum(int(crop[1, 0, 0]) > int(crop[1, 0, -1]) for crop, _ in crops)
    assert 18 <= mirrored <= 42
    again = view(pair, random.Random(7))
    assert torch.equal(again[0], crops[7][0]) and torch.equal(again[1], crops[7][1])


def test_the_frame_and_its_scale_decide_the_size():
    image, label = gradient(30, 60)
    view = CropView(400, frame=(200, 90), scale=(0.5, 2))
    heights = set()
    for seed in range(30):
        crop, marks = view((image, label), random.Random(seed))
        inside = marks != IGNORE
        heights.add(int(inside.any(1).sum()))
        assert abs(int(inside.any(0).sum()) - 2 * int(inside.any(1).sum())) <= 1
        assert (torch.tensor(GRAY) == crop[:, ~inside].T).all()
    assert 45 <= min(heights) < 70 and 150 < max(heights) <= 180


def test_a_crop_of_one_class_is_drawn_again():
    image, label = gradient(64, 64)
    label = (torch.arange(64)[None] >= 56).long().expand(64, 64)  # rare: an eighth of the image

    def rare(most):
        view = CropView(16, scale=(1, 1), most=most)
        return sum(bool(view((image, label), random.Random(s))[1].any()) for s in range(60))

    assert rare(0.75) > 1.5 * rare(1.0)


def test_an_image_without_labels_is_no_trouble():
    crop, marks = CropView(32)(black_pixels(), random.Random(0))
    assert crop.shape == (3, 32, 32) and marks.eq(IGNORE).all()


def test_ids_above_255_stay_as_they_are_and_255_alone_is_ignored(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    ids = np.full((24, 40), 300, dtype=np.uint16)
    ids[:, 10:20], ids[:, 20:30], ids[:, 30:] = 255, 256, 44
    for i in range(2):
        save(tmp_path / "images" / f"{i}.png", photo(i))
        Image.fromarray(ids).save(tmp_path / "labels" / f"{i}.png")
    seen = open_segmentation("folder", tmp_path, "train")
    assert len(seen.class_names) == 301
    view = CropView(96, scale=(1.5, 1.6))
    found = [view(seen[0], random.Random(seed))[1] for seed in range(9)]
    assert all(marks.dtype == torch.int64 for marks in found)
    assert {int(i) for marks in found for i in marks.unique()} == {44, IGNORE, 256, 300}
    predict = {"right": torch.from_numpy(ids.astype(int)), "wrong": torch.full((24, 40), 44)}
    scored = [scores.mean_iou(lambda image, p=p: p, seen, torch.device("cpu"))[0]["miou"]
              for p in predict.values()]  # fmt: skip
    assert scored == [1, pytest.approx(1 / 3 / 3)]


def test_saturation_is_that_of_hsv():
    import colorsys

    pixels = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 255
    pixels[:, 0, 0] = 90  # gray has no color to strengthen
    for factor in (0.5, 1.3, 3.0):
        found = saturated(pixels, factor)
        for y in range(4):
            for x in range(5):
                hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[:, y, x] / 255).tolist())
                expected = colorsys.hsv_to_rgb(hue, min(1, saturation * factor), value)
                assert (found[:, y, x] / 255).tolist() == pytest.approx(expected, abs=1e-5)


def test_distortion_changes_colors_and_keeps_the_type():
    image = torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8)
    found = [distorted(image, random.Random(seed)) for seed in range(30)]
    assert all(each.dtype == torch.uint8 and each.shape == image.shape for each in found)
    changed = [(each.float() - image.float()).abs().mean().item() for each in found]
    assert max(changed) > 20 and min(changed) < 5


def test_boxes_and_masks_follow_their_image():
    image, _ = gradient(30, 60)
    masks = torch.zeros(1, 30, 60, dtype=torch.uint8)
    masks[0, 6:18, 10:30] = 1
    target = dict(boxes=torch.tensor([[10.0, 6, 30, 18]]), labels=torch.tensor([3]), masks=masks,
                  image_id=torch.tensor(9))  # fmt: skip
    sizes, mirrored = set(), 0
    for seed in range(24):
        seen, found = ObjectView((45, 60), 100)((image, target), random.Random(seed))
        y, x = seen.shape[-2:]
        sizes.add((y, x))
        rows, columns = (found["masks"][0].any(axis).nonzero() for axis in (1, 0))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found["boxes"][0].tolist() == pytest.approx([int(side) for side in box], abs=1)
        mirrored += int(seen[1, 0, 0]) > int(seen[1, 0, -1])
        assert found["labels"].tolist() == [3] and int(found["image_id"]) == 9
    assert sizes == {(45, 90), (50, 100)} and 5 <= mirrored <= 19


def test_a_batch_of_unlike_sizes_is_two_lists():
    samples = [
        ((torch.zeros(3, i, 4), {"labels": torch.tensor([i])}), [(f"{i}", "bad")]) for i in (5, 6)
    ]
    (images, targets), failures = objects(samples)
    assert [image.shape[1] for image in images] == [5, 6] and targets[1]["labels"].item() == 6
    assert failures == [("5", "bad"), ("6", "bad")]


# ------------------------------------------------------------------------ boxes and masks


def draw_coco(root, more=0):
    """Two images, one of them without an object; square objects, a crowd, no area. more: images
    like the first."""
    runs = encoding.encode(np.asfortranarray(np.ones((24, 40), dtype=np.uint8)))
    crowd = {**runs, "counts": runs["counts"].decode()}
    shapes = [
        dict(image_id=5, category_id=18, bbox=[4, 6, 10, 8], iscrowd=0, area=80,
             segmentation=[[4, 6, 14, 6, 14, 14, 4, 14]]),
        dict(image_id=5, category_id=3, bbox=[20, 2, 15, 20], iscrowd=0, area=300,
             segmentation=[[20, 2, 35, 2, 35, 22, 20, 22]]),
        dict(image_id=5, category_id=3, bbox=[0, 0, 40, 24], iscrowd=1, area=960,
             segmentation=crowd),
        dict(image_id=5, category_id=3, bbox=[7, 7, 0, 3], iscrowd=0, area=0,
             segmentation=[[7, 7, 7, 7, 7, 10]]),
        dict(image_id=6, category_id=3, bbox=[0, 0, 40, 24], iscrowd=1, area=960,
             segmentation=crowd),
    ]  # fmt: skip
    ids = [6, 5, *range(7, 7 + more)]
    shapes += [dict(shape, image_id=i) for i in ids[2:] for shape in shapes[:2]]
    for part in ("train", "val"):
        for i in ids:
            save(root / f"{part}2017" / f"{i:012d}.jpg", photo(i))
        contents = dict(
            images=[dict(id=i, file_name=f"{i:012d}.jpg", height=24, width=40) for i in ids],
            categories=[dict(id=18, name="dog"), dict(id=3, name="car")],
            annotations=[
                dict(each, id=n + 1)
                for n, each in enumerate(shapes)
                if part == "train" or each["area"]
            ],  # what has none cannot be found
        )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(contents))
    return root


def test_objects_of_coco_have_boxes_classes_and_masks_but_crowds_do_not_count(tmp_path):
    root = draw_coco(tmp_path)
    seen, unseen = (
        CocoObjects(root, "train", trained=True, judged=False),
        CocoObjects(root, "val", trained=False, judged=True),
    )
    assert (seen.ids, unseen.ids, seen.categories) == ([5], [5, 6], [3, 18])
    image, target = seen[0]
    assert image.shape == (3, 24, 40) and target["boxes"].tolist() == [
        [4, 6, 14, 14],
        [20, 2, 35, 22],
    ]
    assert target["labels"].tolist() == [2, 1] and int(target["image_id"]) == 5
    assert target["masks"].dtype == torch.uint8 and target["masks"].sum((1, 2)).tolist() == [
        80,
        300,
    ]
    assert seen.truth is None and unseen.truth is not None
    _, empty = unseen[1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 24, 40)
    assert unseen.subset([1]).ids == [6] and len(unseen.subset([1])) == 1
    (root / "val2017" / "000000000006.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images are missing in .*val2017, 00"):
        CocoObjects(root, "val", False, True)
    save(root / "train2017" / "000000000005.jpg", photo(0, 20, 30))
    with pytest.raises(ValueError, match="is 30 x 20, but its annotations are of 40 x 24"):
        seen[0]


def test_an_outline_and_runs_of_both_kinds_are_the_same_mask():
    square = np.zeros((5, 7), dtype=np.uint8)
    square[1:4, 2:6] = 1
    runs = encoding.encode(np.asfortranarray(square))
    counts = [11, 3, 2, 3, 2, 3, 2, 3, 6]  # down the columns, off and on by turns
    for shape in ([[2, 1, 6, 1, 6, 4, 2, 4]], dict(size=[5, 7], counts=counts), runs):
        assert np.array_equal(mask_of(shape, 5, 7), square)


SQUARE = [[4, 6, 14, 6, 14, 14, 4, 14]]


def coco_with(root, changes, part="train", number=0):
    """COCO's tree with changes in one annotation; a change to None takes the key away."""
    file = draw_coco(root) / "annotations" / f"instances_{part}2017.json"
    contents = json.loads(file.read_text())
    found = contents["annotations"][number]
    found.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del found[key]
    file.write_text(json.dumps(contents))
    return file


@pytest.mark.parametrize("changes, complaint", [
    (dict(segmentation=None), "has no outline: its segmentation is None"),
    (dict(segmentation=[]), "has no outline: its segmentation is []"),
    (dict(segmentation=[[1, 2, 3]]), "has an outline of 3 numbers: three corners need 6"),
    (dict(segmentation=[[1, 2, 3, 4]]), "has an outline of 4 numbers"),
    (dict(segmentation=[1, 2, 3, 4, 5, 6]), "has an outline that is no list of numbers"),
    (dict(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "is no list of numbers"),
    (dict(segmentation=dict(counts=[40], size=[8, 5])), "which is 24 high and 40 wide"),
    (dict(segmentation=dict(size=[24, 40])), "has no runs"),
    (dict(category_id=7), "has category_id 7, which is none of its categories"),
    (dict(bbox=None), "has no bbox of four numbers: None"),
    (dict(bbox=[4, 6, 10]), "has no bbox of four numbers: [4, 6, 10]"),
])  # fmt: skip
@pytest.mark.parametrize("part", ["train", "val"])
def test_an_annotation_that_cannot_be_used_is_refused_with_its_id_and_file(
    changes, complaint, part, tmp_path
):
    file = coco_with(tmp_path, changes, part)
    with pytest.raises(ValueError) as caught:
        CocoObjects(tmp_path, part, trained=part == "train", judged=part == "val")
    said = str(caught.value)
    assert said.startswith(f"annotation 1 in {file} has") and complaint in said
    assert "\n" not in said


def test_crowds_and_areas_matter_where_objects_are_judged_and_only_there(tmp_path):
    coco_with(tmp_path, dict(segmentation=None), number=2)  # the crowd of image 5
    assert len(CocoObjects(tmp_path, "train", trained=True, judged=False)[0][1]["labels"]) == 2
    with pytest.raises(ValueError, match=r"annotation 3 in .* has no outline"):
        CocoObjects(tmp_path, "train", trained=False, judged=True)
    coco_with(tmp_path, dict(area=None))
    assert len(CocoObjects(tmp_path, "train", trained=True, judged=False)) == 1
    with pytest.raises(ValueError, match=r"annotation 1 in .* has no area"):
        CocoObjects(tmp_path, "train", trained=False, judged=True)


def test_an_object_without_iscrowd_is_no_crowd_and_can_be_judged(tmp_path):
    coco_with(tmp_path, dict(iscrowd=None), "val")
    data = CocoObjects(tmp_path, "val", trained=False, judged=True)
    box = dict(image_id=5, category_id=18, bbox=[4, 6, 10, 8], score=1.0)
    box["segmentation"] = encoding.encode(np.asfortranarray(mask_of(SQUARE, 24, 40)))
    assert scores.average_precision(data, [box])["box_ap50"] == pytest.approx(1 / 2)


def test_a_file_that_holds_no_annotations_of_coco_is_named(tmp_path):
    file = draw_coco(tmp_path) / "annotations" / "instances_val2017.json"
    for contents in ("[]", "{", '{"annotations": [{}]}', '{"images": []}'):
        file.write_text(contents)
        with pytest.raises(ValueError, match=r"instances_val2017.json holds no annotations of"):
            CocoObjects(tmp_path, "val", trained=False, judged=True)
    file.write_text(json.dumps(dict(images=[dict(id=5, file_name="5.jpg")], annotations=[],
                                    categories=[])))  # fmt: skip
    with pytest.raises(ValueError, match=r"image 5 in .*instances_val2017.json has no height"):
        CocoObjects(tmp_path, "val", trained=False, judged=True)


@pytest.mark.parametrize("shape", [None, [], [[1, 2, 3]], [[1, 2, 3, 4]], {}, [1, 2, 3, 4, 5, 6],
                                   dict(counts=[3, 4], size=[2, 2])])  # fmt: skip
def test_what_is_no_outline_is_one_line_whatever_pycocotools_raises(shape):
    with pytest.raises(ValueError, match=r"^no usable outline .*[^\n]$"):
        mask_of(shape, 24, 40)


def test_packed_values_come_back_as_they_were():
    values = [{"a": [1, 2.5]}, [], "text", (None, b"x")]
    packed = Packed(values)
    assert [packed[i] for i in range(len(packed))] == values


def test_finding_everything_is_a_precision_of_one_and_finding_nothing_of_zero(tmp_path):
    data = CocoObjects(draw_coco(tmp_path), "val", trained=False, judged=True)
    truth = {tuple(image.flatten()[:9].tolist()): target for image, target in data}

    def perfect(image):
        target = truth[tuple(image.flatten()[:9].tolist())]
        return {**target, "scores": torch.ones(len(target["labels"])), "masks": target["masks"] > 0}

    def nothing(image):
        return dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), scores=torch.zeros(0),
                    masks=torch.zeros(0, 24, 40, dtype=torch.bool))  # fmt: skip

    device = torch.device("cpu")
    found, details = scores.coco_precision(perfect, data, device)
    assert details == dict(detections=2)
    assert [found[k] for k in ("box_ap", "mask_ap", "mask_ap75")] == pytest.approx([1, 1, 1])
    assert np.isnan(found["box_ap_large"])  # nothing large is to be found
    assert scores.coco_precision(nothing, data, device)[0]["box_ap"] == 0


@needs_coco
def test_the_precision_is_pycocotools_called_by_hand(tmp_path):
    """Spoiled ground truth as detections, with the same file read by pycocotools alone."""
    data = CocoObjects(TINY_COCO, "val", trained=False, judged=True).subset(range(0, 50, 4))
    generator = torch.Generator().manual_seed(0)
    targets = {tuple(image.flatten()[:99].tolist()): target for image, target in data}

    def detector(image):
        target = targets[tuple(image.flatten()[:99].tolist())]
        n = len(target["labels"])
        shift = 6 * torch.randn(n, 1, generator=generator)
        return dict(boxes=target["boxes"] + shift, scores=torch.rand(n, generator=generator),
                    labels=target["labels"], masks=target["masks"].roll(3, -1) > 0)  # fmt: skip

    found, _ = scores.coco_precision(detector, data, torch.device("cpu"))
    generator.manual_seed(0)
    by_hand = []
    for image, target in data:
        result = detector(image)
        for i in range(len(result["labels"])):
            x1, y1, x2, y2 = result["boxes"][i].tolist()
            runs = encoding.encode(np.asfortranarray(result["masks"][i].numpy().astype(np.uint8)))
            by_hand.append(dict(
                image_id=int(target["image_id"]), score=result["scores"][i].item(),
                category_id=data.categories[int(result["labels"][i]) - 1],
                bbox=[x1, y1, x2 - x1, y2 - y1],
                segmentation=dict(size=runs["size"], counts=runs["counts"].decode()),
            ))  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(by_hand))
    with contextlib.redirect_stdout(None):
        truth = COCO(Path(TINY_COCO) / "annotations" / "instances_val2017.json")
        results = truth.loadRes(str(tmp_path / "results.json"))
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            judge = COCOeval(truth, results, kind)
            judge.params.imgIds = data.ids
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            ours = [found[f"{name}_{key}"] for key in scores.PRECISION]
            assert ours == pytest.approx(judge.stats[:6].tolist(), abs=1e-12)
            assert 0.05 < ours[0] < 0.95


def test_the_mean_iou_is_of_the_whole_data_set_not_of_images():
    """Two images: class 1 is right in a large one and wrong in a small one."""
    labels = [torch.tensor([[1, 1, 1, 0]]), torch.tensor([[1, 0, IGNORE, 0]])]
    answers = [torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 0, 0, 1]])]
    data = [(torch.full((3, 1, 4), i, dtype=torch.uint8), label) for i, label in enumerate(labels)]

    class Pairs(list):
        class_names = ("ground", "thing", "absent")

    found, details = scores.mean_iou(
        lambda image: answers[int(image[0, 0, 0])], Pairs(data), torch.device("cpu"))  # fmt: skip
    iou = [2 / 4, 3 / 5]  # ground: right 2 of 2 + 1 + 1; thing: right 3 of 3 + 1 + 1
    assert found["miou"] == pytest.approx(sum(iou) / 2) and found["accuracy"] == pytest.approx(
        5 / 7
    )
    assert details["iou"] == {"ground": pytest.approx(iou[0]), "thing": pytest.approx(iou[1]),
                              "absent": None}  # fmt: skip


def test_every_rank_scores_its_own_images():
    data = [(torch.full((1,), i), i) for i in range(7)]
    shares = [[int(label) for _, label in scores.share(data, rank, 3, 0, torch.device("cpu"))]
              for rank in range(3)]  # fmt: skip
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


def test_the_black_image_of_a_rank_without_data_can_be_learned_from():
    image, target = ObjectView((64,), 100)(black_objects(), random.Random(0))
    assert image.shape == (3, 64, 64) and target["masks"].sum() == 32 * 32
    assert isinstance(open_segmentation("toy", "", "val"), Labeled)
