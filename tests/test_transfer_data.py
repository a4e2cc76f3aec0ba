"""downstream/: labeled data in the owners' layouts, what a step sees of it, and the scores."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as encoding
from test_datasets import draw_voc
from torchvision.datasets import wrap_dataset_for_transforms_v2

import toy
from backbone import build_backbone
from downstream import detection, segmentation
from downstream.backbones import share, some_of
from downstream.settings import PRESETS
from engine import log
from engine.processes import Place
from measures.metrics import IGNORE
from trained import write

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
HERE = Place(torch.device("cpu"))
DETECTION, VOC = PRESETS["detection"]["coco"], PRESETS["segmentation"]["voc"]


def photo(seed, y=24, x=40):
    return np.random.default_rng(seed).integers(0, 256, (y, x, 3))


def draw_coco(root, more=0):
    """Two images, one of them without an object, in a folder; outlines, runs as numbers and as
    text, a crowd, a box without an area, ids of any order, no "info". more: images like the first.
    """
    car = np.zeros((24, 40), dtype=np.uint8, order="F")
    car[2:22, 20:35] = 1
    many = np.arange(960).reshape(24, 40) % 7 > 2
    packed = [encoding.encode(each.astype(np.uint8, order="F")) for each in (car, many)]
    car, crowd = ({**runs, "counts": runs["counts"].decode()} for runs in packed)
    crowd = dict(bbox=[0, 0, 40, 24], iscrowd=1, area=960, category_id=3, segmentation=crowd)
    dog = dict(category_id=18, bbox=[4, 6, 10, 8], iscrowd=0, area=80,
               segmentation=[[4, 6, 14, 6, 14, 14, 4, 14]])  # fmt: skip
    car = dict(category_id=3, bbox=[20, 2, 15, 20], area=300, segmentation=car)
    flat = dict(car, bbox=[7, 7, 0, 3], area=0, segmentation=[[7, 7, 7, 10, 7, 8]])
    images = [dict(id=i, file_name=f"{'other/' * (i == 6)}{i:012d}.jpg", height=24, width=40)
              for i in (6, 5, *range(7, 7 + more))]  # fmt: skip
    for part, shapes in (("train", (dog, car, crowd, flat)), ("val", (dog, car, crowd))):
        plain = dict(crowd, image_id=6, segmentation=dict(size=[24, 40], counts=[7, 953]))
        found = [dict(shape, image_id=5) for shape in shapes] + [plain]
        found += [dict(shape, image_id=each["id"]) for each in images[2:] for shape in (dog, car)]
        for each in images:
            write(root / f"{part}2017" / each["file_name"], photo(each["id"]))
        contents = dict(
            images=images,
            categories=[dict(id=18, name="dog"), dict(id=3, name="car")],
            annotations=[dict(each, id=(n + 1) % len(found)) for n, each in enumerate(found)],
        )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(contents))
    return root


@pytest.mark.parametrize("dataset, draw, options, sizes, ids", [
    ("voc", draw_voc, {}, (2, 1, 21), {0, IGNORE}),
    ("voc", draw_voc, dict(train_list="train"), (1, 1, 21), {1, IGNORE}),
    ("toy", lambda root: None, dict(labeled=3), (3, 256, len(toy.CLASS_NAMES)), None),
])  # fmt: skip
def test_every_layout_has_its_lists_and_classes(dataset, draw, options, sizes, ids, tmp_path):
    draw(tmp_path)
    c = replace(PRESETS["segmentation"][dataset], data_dir=str(tmp_path), **options)
    backbone = build_backbone("tiny" if dataset == "toy" else "resnet18")
    model, seen, unseen = segmentation.prepare(c, backbone)
    assert (len(seen), len(unseen), model.classes) == sizes
    assert ids == (set(seen[0][1].unique().tolist()) if ids else None)
    _, seen, unseen = segmentation.prepare(replace(c, test_on="train", labeled=1), backbone)
    assert seen is unseen and len(seen) == 1


def test_a_wrong_tree_says_what_was_expected_and_what_was_found(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(ValueError, match=f"expects in --data-dir: .*found in {tmp_path}: holiday/"):
        opened(tmp_path)


def test_some_labeled_images_are_a_random_few_the_same_for_the_same_seed():
    few = [some_of(range(500), replace(VOC, labeled=20, seed=seed)) for seed in (3, 3, 4)]
    assert len(set(few[0])) == 20 and few[0] == sorted(few[0]) == few[1] != few[2]
    assert some_of([5, 7, 9], VOC) == [5, 7, 9]
    with pytest.raises(ValueError, match="--labeled 10, but there are 9"):
        some_of(range(9), replace(VOC, labeled=10))


def gradient(y, x):
    """An image whose colors tell where a pixel was, and a label: its right half."""
    rows, columns = np.mgrid[:y, :x]
    right = columns >= x / 2
    image = np.stack([rows * 255 // (y - 1), columns * 255 // (x - 1), right * 200])
    return torch.from_numpy(image.astype(np.uint8)), torch.from_numpy(right.astype(int))


def crops(pair, seeds, **options):
    c = replace(VOC, **{"frame": (0, 0), "crop": 16, **options})
    return [segmentation.view(pair, random.Random(seed), c) for seed in range(seeds)]


def test_a_crop_is_cut_from_image_and_label_alike_and_mirrored_half_of_the_time():
    image, label = gradient(50, 70)
    found = crops((image, label), 60, scale=(1, 1))
    places = {tuple(p) for p in image.flatten(1).T.tolist()}
    for crop, marks in found:
        assert crop.shape == (3, 16, 16) and marks.shape == (16, 16) and marks.dtype == torch.int64
        assert torch.equal(crop[2].long(), marks * 200)
        assert {tuple(p) for p in crop.flatten(1).T.tolist()} <= places
    assert 18 <= sum(int(crop[1, 0, 0]) > int(crop[1, 0, -1]) for crop, _ in found) <= 42
    # The right eighth is rare: one draw has enough of it in 4 of 49 cases, ten in 57 %
    label = (torch.arange(64)[None] >= 56).long().expand(64, 64)
    found = crops((gradient(64, 64)[0], label), 60, scale=(1, 1))
    assert 25 < sum(marks.float().mean().item() > 0.25 for _, marks in found) < 45


def test_the_frame_and_its_scale_decide_the_size_and_the_rest_is_gray():
    heights = set()
    for crop, marks in crops(gradient(30, 60), 30, frame=(200, 90), crop=400):
        inside = marks != IGNORE
        heights.add(int(inside.any(1).sum()))
        assert abs(int(inside.any(0).sum()) - 2 * int(inside.any(1).sum())) <= 1
        assert (torch.tensor(segmentation.GRAY) == crop[:, ~inside].T).all() and inside[0, 0]
    assert 45 <= min(heights) < 70 and 150 < max(heights) <= 180


class Scripted(random.Random):
    """Coins and numbers from a list."""

    def __init__(self, *numbers):
        self.random = iter(numbers).__next__  # uniform asks it too


@pytest.mark.parametrize("draws, expected", [
    ((1, 1, 1, 1, 1), (100, 60, 20)),  # nothing is drawn
    ((0, 1.0, 1, 1, 1, 1), (132, 92, 52)),  # 32 brighter
    ((1, 0, 1.0, 1, 1, 1), (150, 90, 30)),  # 1.5 times the contrast, around black
    ((1, 1, 0, 0.2, 1, 1), (100, 72, 44)),  # 0.7 times the saturation
    ((1, 1, 1, 0, 1.0, 1), (92, 100, 20)),  # 0.1 turns from hue 1/12: a tenth beyond yellow
])  # fmt: skip
def test_colors_change_as_in_mmsegmentation(draws, expected):
    image = torch.tensor([100, 60, 20], dtype=torch.uint8)[:, None, None].expand(3, 4, 5)
    found = segmentation.distorted(image, Scripted(*draws))
    assert found.dtype == torch.uint8 and found.shape == (3, 4, 5)
    assert found[:, 2, 3].tolist() == pytest.approx(expected, abs=1)


def opened(root):
    """What a detector learns from, and what it is tested on."""
    c = replace(DETECTION, data_dir=str(root))
    return detection.prepare(c, build_backbone("resnet18"))[1:]


def test_boxes_and_masks_follow_their_image(tmp_path):
    image, _ = gradient(24, 40)
    _, target = opened(draw_coco(tmp_path))[0][0]
    target["boxes"][1] += torch.tensor([0, 0, 30, 0])  # over the border
    sizes, mirrored = set(), 0
    for seed in range(24):
        c = replace(DETECTION, shorts=(77, 45), longest=120)
        seen, found = detection.view((image, target), random.Random(seed), c)
        y, x = seen.shape[-2:]
        sizes.add((y, x))
        flipped = int(seen[1, 0, 0]) > int(seen[1, 0, -1])
        mirrored += flipped
        rows, columns = (found["masks"][0].any(axis).nonzero() for axis in (1, 0))
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found["boxes"][0].tolist() == pytest.approx([int(side) for side in box], abs=1)
        assert found["boxes"][1, 0 if flipped else 2] == (0 if flipped else x)
        assert found["labels"].tolist() == [2, 1] and found["masks"].dtype == torch.uint8
    assert sizes == {(45, 75), (72, 120)} and 5 <= mirrored <= 19
    target["boxes"][0] = torch.tensor([50, 6, 60, 14])  # none of it is in the image
    _, found = detection.view((image, target), random.Random(0), DETECTION)
    assert len(found["boxes"]) == len(found["masks"]) == 1 and found["labels"].tolist() == [1]


def test_objects_of_coco_have_boxes_classes_and_masks_but_crowds_do_not_count(tmp_path):
    seen, unseen = opened(draw_coco(tmp_path))
    assert (seen.ids, unseen.ids, seen.labels) == ([5], [5, 6], {3: 1, 18: 2})
    image, target = seen[0]
    assert image.shape == (3, 24, 40) and target["labels"].tolist() == [2, 1]
    assert target["boxes"].tolist() == [[4, 6, 14, 14], [20, 2, 35, 22]]
    assert target["boxes"].is_floating_point()  # although the file has whole numbers
    assert target["masks"].sum((1, 2)).tolist() == [80, 300]
    assert unseen[1][1] == []


def coco_with(root, changes, part="train", kind="annotations"):
    """COCO's tree with changes in one entry; a change to None takes the key away."""
    file = draw_coco(root) / "annotations" / f"instances_{part}2017.json"
    contents = json.loads(file.read_text())
    changed = {**contents[kind][0], **changes}
    contents[kind][0] = {key: value for key, value in changed.items() if value is not None}
    file.write_text(json.dumps(contents))
    return file


UNUSABLE = {  # of the first dog
    "segmentation": [
        None, [], [[1, 2, 3]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6],
        [[4, 6, 14, 14, 4, float("nan")]],
        [[1, 2, 3, 4, 5, 10**9]], dict(size=[24, 40]), dict(size=[40, 24], counts=[960]),
        dict(size=[24, 40], counts=[102, *[8, 16] * 9, 8]),  # the last run is missing
        dict(size=[24, 40], counts=[900]), dict(size=[24, 40], counts=[-40, 1000]),
        dict(size=[24, 40], counts="34"),
    ],
    "id": [None, 2], "category_id": [7], "image_id": [7, [5]], "area": [None],
    "bbox": [None, [4, 6, 10], [4, 6, 10, -1], [4, 6, float("inf"), 1], [4, 6, 40, 14],
             [-500, -500, 10, 8]],
}  # fmt: skip


@pytest.mark.parametrize("kind, key, value", [
    *[("annotations", key, value) for key in UNUSABLE for value in UNUSABLE[key]],
    ("images", "height", None), ("images", "file_name", None), ("categories", "id", "dog"),
])  # fmt: skip
def test_an_entry_that_cannot_be_used_is_refused_with_its_id_and_file(kind, key, value, tmp_path):
    file = coco_with(tmp_path, {key: value}, "val", kind)
    with pytest.raises(ValueError) as caught:
        opened(tmp_path)
    number = repr(value) if key == "id" else dict(annotations=1, images=6)[kind]
    found = f"{file}, {kind}, id {number}: {key} cannot be {value!r:.60}; expected "
    assert str(caught.value).startswith(found)


@pytest.mark.parametrize("box", [[0.1, 0.25, 0.25, 0.33], [9, 10, 10, 8]])
def test_a_box_that_is_not_where_its_mask_is_is_refused(box, tmp_path):
    """As shares of the image, or with the center first."""
    coco_with(tmp_path, dict(bbox=box))
    with pytest.raises(ValueError, match=rf"id 1: segmentation cannot be .*{box[0]}"):
        opened(tmp_path)
    coco_with(tmp_path, dict(bbox=[3, 5, 12, 9]))  # a pixel wider is drawn by hand
    opened(tmp_path)


@pytest.mark.parametrize("contents", [b"[]", b"{", b"\xff", b'{"annotations": [5]}'])
def test_a_file_without_annotations_is_named(contents, tmp_path):
    file = draw_coco(tmp_path) / "annotations" / "instances_train2017.json"
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=f"{file} holds no annotations in COCO's form: .*$"):
        opened(tmp_path)


def test_boxes_of_which_half_are_below_a_pixel_are_refused(tmp_path):
    file = coco_with(tmp_path, {})
    contents = json.loads(file.read_text())
    for each in contents["annotations"][:3]:
        each.update(bbox=[5, 6, 0.5, 0.5], segmentation=[[5, 6, 5.5, 6, 5.5, 6.5]], iscrowd=0)
    file.write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="only 1 of 5 boxes have a pixel; expected x y width"):
        opened(tmp_path)


def test_parts_with_other_categories_and_images_that_annotations_do_not_fit_are_refused(tmp_path):
    seen, file = opened(draw_coco(tmp_path))[0], tmp_path / "train2017" / "000000000005.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.open(file).save(file, exif=exif)
    with pytest.raises(ValueError, match=r"000000000005.jpg: its EXIF orientation is 3"):
        seen[0]  # viewers turn it
    write(file, photo(0, 20, 30))
    with pytest.raises(ValueError, match="is 30 x 20, but its annotations are of 40 x 24"):
        seen[0]
    coco_with(tmp_path, dict(name="cat"), "val", "categories")
    with pytest.raises(ValueError, match=r"differ: 18 cat, 18 dog; give"):
        opened(tmp_path)


class Answers:
    """A network that finds what a detector would learn from; most: so many objects per image."""

    def __init__(self, data, most=99):
        self.known = {}
        for image, target in wrap_dataset_for_transforms_v2(data, ("boxes", "labels", "masks")):
            masks = torch.zeros(0, *image.shape[1:])
            none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), masks=masks)
            found = {key: target.get(key, value)[:most] for key, value in none.items()}
            found["scores"] = torch.ones(len(found["boxes"]))
            self.known[image.numpy().tobytes()] = found

    def predict(self, image):
        return self.known[image.numpy().tobytes()]


def scores_of(data, **most):
    return detection.scores(Answers(data, **most), data, share(data, HERE, 0), HERE)


@pytest.mark.parametrize("most, precision", [(2, 1), (1, 0.5), (0, 0)])
def test_finding_everything_is_a_precision_of_one_and_nothing_zero(most, precision, tmp_path):
    """Half of it: one class is found always, the other one never."""
    _, data = opened(draw_coco(tmp_path))
    for _ in range(2):  # scoring changes nothing
        scores = scores_of(data, most=most)
        assert scores["detections"] == most and scores["box_ap_large"] in (None, 0)
        for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap75"):
            assert scores[name] == pytest.approx(precision)


JUNK = (None, True, 0, -1, 1.5, "", "x", "0", [], {}, [1], float("nan"), float("inf"), 10**30, 1e-3)


def damage(contents, rng):
    """Replaces, repeats, cuts or takes away something in a nest of dictionaries and lists."""
    where, key = contents, rng.choice(sorted(contents))
    while isinstance(where[key], (dict, list)) and where[key] and rng.random() < 0.9:
        where = where[key]
        key = rng.choice(list(where) if isinstance(where, dict) else range(len(where)))
    act = rng.choice(("replace", "repeat", "cut", "take away"))
    if act == "take away":
        del where[key]
    elif act == "repeat" and isinstance(where, list):
        where.insert(key, where[key])
    else:
        where[key] = where[key][:-1] if isinstance(where[key], str) else rng.choice(JUNK)


def test_a_damaged_file_is_one_line_or_gives_perfect_detections_a_score_of_one(tmp_path):
    file, refused = draw_coco(tmp_path) / "annotations" / "instances_val2017.json", 0
    whole = file.read_text()
    for seed in range(300):
        contents = json.loads(whole)
        damage(contents, random.Random(seed))
        file.write_text(json.dumps(contents))
        try:
            scores = scores_of(detection.CocoObjects(str(tmp_path), "val"))
            assert (scores["box_ap"], scores["mask_ap"]) == pytest.approx((1, 1)), seed
        except ValueError as error:
            assert "\n" not in str(error), seed
            refused += 1
    assert 100 < refused < 290


def test_a_long_reading_of_annotations_says_how_far_it_is(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(log, "OFTEN", 0)
    for rank in (0, 1):
        monkeypatch.setattr(log, "rank_and_world_size", lambda rank=rank: (rank, 2))
        detection.CocoObjects(str(draw_coco(tmp_path / str(rank))), "val")
        said = capfd.readouterr().err
        assert ("instances_val2017.json, annotations: 1 of 4, 0:00:0" in said) == bool(said)
        assert bool(said) == (rank == 0)


def test_every_rank_scores_its_own_images():
    data = [(torch.full((1,), i), i) for i in range(7)]
    places = [Place(torch.device("cpu"), rank, 3) for rank in range(3)]
    found = [[(index, label) for index, (_, label) in share(data, place, 0)] for place in places]
    assert found == [[(i, i) for i in part] for part in ((0, 3, 6), (1, 4), (2, 5))]
