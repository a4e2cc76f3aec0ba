"""downstream/: labeled data in the owners' layouts, what a step sees of it, and the scores."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as encoding
from test_datasets import draw_ade20k, draw_cityscapes, draw_voc
from torchvision.datasets import wrap_dataset_for_transforms_v2

from backbone import build_backbone
from downstream import detection, segmentation
from downstream.annotations import read_annotations
from downstream.backbones import share, some_of
from downstream.settings import PRESETS
from engine.processes import Place
from measures.metrics import IGNORE

HERE = Place(torch.device("cpu"))
DETECTION, VOC = PRESETS["detection"]["coco"], PRESETS["segmentation"]["voc"]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def photo(seed, y=24, x=40):
    return np.random.default_rng(seed).integers(0, 256, (y, x, 3))


def draw_folder(root, counts=(("train", 3), ("val", 3))):
    """A folder without classes.txt; counts: part, number of classes."""
    for part, count in counts:
        for i in range(5):
            save(root / "images" / part / f"{i}.png", photo(i))
            save(root / "labels" / part / f"{i}.png", np.full((24, 40), i % count))
    return root


SQUARE = [[4, 6, 14, 6, 14, 14, 4, 14]]


def draw_coco(root, more=0):
    """Two images, one of them without an object; square objects, a crowd, a box without an area.
    more: images like the first.
    """
    crowded = np.arange(960, dtype=np.uint8).reshape(24, 40) % 7 > 2  # many runs, packed as text
    runs = encoding.encode(np.asfortranarray(crowded.astype(np.uint8)))
    crowd = dict(bbox=[0, 0, 40, 24], iscrowd=1, area=960, category_id=3,
                 segmentation={**runs, "counts": runs["counts"].decode()})  # fmt: skip
    dog = dict(category_id=18, bbox=[4, 6, 10, 8], iscrowd=0, area=80, segmentation=SQUARE)
    car = dict(category_id=3, bbox=[20, 2, 15, 20], iscrowd=0, area=300,
               segmentation=[[20, 2, 35, 2, 35, 22, 20, 22]])  # fmt: skip
    flat = dict(car, bbox=[7, 7, 0, 3], area=0, segmentation=[[7, 7, 7, 10, 7, 8]])
    ids = [6, 5, *range(7, 7 + more)]
    for part, shapes in (("train", (dog, car, crowd, flat)), ("val", (dog, car, crowd))):
        plain = dict(crowd, image_id=6, segmentation=dict(size=[24, 40], counts=[7, 953]))
        found = [dict(shape, image_id=5) for shape in shapes] + [plain]
        found += [dict(shape, image_id=i) for i in ids[2:] for shape in (dog, car)]
        for i in ids:
            save(root / f"{part}2017" / f"{i:012d}.jpg", photo(i))
        contents = dict(
            images=[dict(id=i, file_name=f"{i:012d}.jpg", height=24, width=40) for i in ids],
            categories=[dict(id=18, name="dog"), dict(id=3, name="car")],
            annotations=[dict(each, id=n + 1) for n, each in enumerate(found)],
        )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(contents))
    return root


@pytest.mark.parametrize("dataset, draw, options, sizes, ids", [
    ("voc", draw_voc, {}, (2, 1, 21), {0, IGNORE}),
    ("voc", draw_voc, dict(train_list="train"), (1, 1, 21), {1, IGNORE}),
    ("cityscapes", draw_cityscapes, {}, (2, 1, 19), {0, 18, IGNORE}),
    ("ade20k", draw_ade20k, {}, (2, 1, 150), {0, 149, IGNORE}),
    ("folder", draw_folder, {}, (5, 5, 3), {0}),
    ("toy", lambda root: None, dict(labeled=3), (3, 256, 8), None),
])  # fmt: skip
def test_every_layout_is_learned_from_and_tested_with_its_own_lists_and_classes(
    dataset, draw, options, sizes, ids, tmp_path
):
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


def test_the_frame_and_its_scale_decide_the_size_and_the_rest_is_gray():
    heights = set()
    for crop, marks in crops(gradient(30, 60), 30, frame=(200, 90), crop=400):
        inside = marks != IGNORE
        heights.add(int(inside.any(1).sum()))
        assert abs(int(inside.any(0).sum()) - 2 * int(inside.any(1).sum())) <= 1
        assert (torch.tensor(segmentation.GRAY) == crop[:, ~inside].T).all() and inside[0, 0]
    assert 45 <= min(heights) < 70 and 150 < max(heights) <= 180


def test_a_crop_of_one_class_is_drawn_again():
    """The right eighth is rare: one draw has enough of it in 4 of 49 cases, ten in 57 %."""
    label = (torch.arange(64)[None] >= 56).long().expand(64, 64)
    found = crops((gradient(64, 64)[0], label), 60, scale=(1, 1))
    assert 25 < sum(marks.float().mean().item() > 0.25 for _, marks in found) < 45


class Scripted:
    """A generator that gives coins and numbers from a list."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)

    def uniform(self, low, high):
        share = self.numbers.pop(0)
        return low + share * (high - low)


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
    save(tmp_path / "train2017" / "000000000005.jpg", photo(0, 20, 30))
    with pytest.raises(ValueError, match="is 30 x 20, but its annotations are of 40 x 24"):
        seen[0]


def coco_with(root, changes, part="train", kind="annotations"):
    """COCO's tree with changes in one entry; a change to None takes the key away."""
    file = draw_coco(root) / "annotations" / f"instances_{part}2017.json"
    contents = json.loads(file.read_text())
    found = contents[kind][0]
    found.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del found[key]
    file.write_text(json.dumps(contents))
    return file


BAD_ANNOTATIONS = {
    "segmentation": [
        None, [], [[1, 2, 3]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, float("nan")]],
        [[1, 2, 3, 4, 5, 10**9]], dict(size=[24, 40]), dict(size=[40, 24], counts=[960]),
        dict(size=[24, 40], counts=[102, *[8, 16] * 9, 8]),  # the last run is missing
        dict(size=[24, 40], counts=[900]), dict(size=[24, 40], counts=[-40, 1000]),
        dict(size=[24, 40], counts="34"),
    ],
    "category_id": [7], "image_id": [7, [5]], "area": [None],
    "bbox": [None, [4, 6, 10], [4, 6, 10, -1], [4, 6, float("inf"), 1]],
}  # fmt: skip


@pytest.mark.parametrize(
    "key, value", [(k, v) for k in BAD_ANNOTATIONS for v in BAD_ANNOTATIONS[k]]
)
def test_an_annotation_that_cannot_be_used_is_refused_with_its_id_and_file(key, value, tmp_path):
    file = coco_with(tmp_path, {key: value}, "val")
    with pytest.raises(ValueError) as caught:
        opened(tmp_path)
    assert str(caught.value).startswith(
        f"{file}, annotations, id 1: {key} cannot be {value!r:.60}; "
    )


@pytest.mark.parametrize("box, key", [
    ([0.1, 0.25, 0.25, 0.33], "segmentation"),  # shares of 40 x 24 px
    ([9, 10, 10, 8], "segmentation"),  # the center first
    ([4, 6, 40, 14], "bbox"), ([-500, -500, 10, 8], "bbox"),
])  # fmt: skip
def test_a_box_that_is_not_where_its_mask_is_or_leaves_the_image_is_refused(box, key, tmp_path):
    coco_with(tmp_path, dict(bbox=box))
    with pytest.raises(ValueError, match=rf"id 1: {key} cannot be .*{box[0]}"):
        opened(tmp_path)
    coco_with(tmp_path, dict(bbox=[3, 5, 12, 9]))  # a pixel wider is drawn by hand
    opened(tmp_path)


def test_boxes_of_which_half_are_below_a_pixel_are_refused(tmp_path):
    tiny = dict(bbox=[5, 6, 0.5, 0.5], segmentation=[[5, 6, 5.5, 6, 5.5, 6.5]])
    contents = json.loads(coco_with(tmp_path, {}).read_text())
    for each in contents["annotations"][:3]:
        each.update(tiny, iscrowd=0)
    (tmp_path / "a.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="only 1 of 5 boxes have a pixel; expected x y width"):
        read_annotations(tmp_path / "a.json")


def test_categories_that_differ_between_the_parts_are_refused(tmp_path):
    coco_with(tmp_path, dict(name="cat"), "val", "categories")
    with pytest.raises(ValueError, match=r"differ: 18 cat, 18 dog; give"):
        opened(tmp_path)


def test_a_photograph_that_viewers_turn_is_not_compared_with_boxes(tmp_path):
    draw_coco(tmp_path)
    file, exif = tmp_path / "train2017" / "000000000005.jpg", Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.open(file).save(file, exif=exif)
    with pytest.raises(ValueError, match=r"000000000005.jpg: its EXIF orientation is 3"):
        opened(tmp_path)[0][0]


@pytest.mark.parametrize("kind, changes, complaint", [
    ("annotations", dict(id=2), "annotations, id 2: id cannot be 2; expected a whole number, once"),
    ("annotations", dict(id=None), "annotations, id None: id cannot be None"),
    ("images", dict(height=None), "height cannot be None"),
    ("images", dict(file_name=None), "file_name cannot be None"),
    ("categories", dict(id="dog"), "categories, id 'dog': id cannot be 'dog'"),
    *[("", each, "holds no annotations in COCO's form") for each in (b"[]", b"{", b"\xff")],
    ("", b'{"annotations": [5]}', "holds no annotations in COCO's form"),
])  # fmt: skip
def test_a_file_of_annotations_that_cannot_be_used_is_named(kind, changes, complaint, tmp_path):
    if kind:
        file = coco_with(tmp_path, changes, kind=kind)
    else:
        file = tmp_path / "a.json"
        file.write_bytes(changes)
    with pytest.raises(ValueError, match=f"{file}.*{complaint}|{complaint}.*{file}") as caught:
        read_annotations(file)
    assert "\n" not in str(caught.value)


class Answers:
    """A network that knows images: it answers what stands beside each."""

    def __init__(self, pairs):
        self.known = {tuple(image.flatten()[:99].tolist()): answer for image, answer in pairs}

    def predict(self, image):
        return self.known[tuple(image.flatten()[:99].tolist())]


def detections(target, image):
    """Boxes and masks of annotations as a detector would find them."""
    n, size = len(target), image.shape[1:]
    boxes = torch.tensor([a["bbox"] for a in target]).reshape(n, 4)
    shapes = (encoding.merge(encoding.frPyObjects(a["segmentation"], *size)) for a in target)
    masks = [torch.from_numpy(encoding.decode(shape)) > 0 for shape in shapes]
    return dict(
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        labels=torch.tensor([a["category_id"] for a in target], dtype=torch.long),
        scores=torch.ones(n),
        masks=torch.stack(masks) if masks else torch.zeros(0, *size),
    )


@pytest.mark.parametrize("found, precision", [(2, 1), (1, 0.5), (0, 0)])
def test_finding_everything_is_a_precision_of_one_and_finding_nothing_of_zero(
    found, precision, tmp_path
):
    """Half of it: one class is found always, the other one never."""
    coco_with(tmp_path, dict(iscrowd=None), "val")  # it is no crowd then
    _, data = opened(tmp_path)
    answers = Answers((image, detections(target[:found], image)) for image, target in data)
    for _ in range(2):  # scoring changes nothing
        scores = detection.scores(answers, data, HERE)
        assert scores["detections"] == found and scores["box_ap_large"] in (None, 0)
        for name in ("box_ap", "box_ap50", "mask_ap", "mask_ap75"):
            assert scores[name] == pytest.approx(precision)


def a_small_file(rng):
    """Contents in COCO's form with the oddities that are read: ids of any order, also 0, folders in
    names, no info, no iscrowd, masks as outlines, runs, or runs packed as text.
    """
    images, annotations = [], []
    categories = rng.choice(9, 3, replace=False).tolist()
    ids = iter(rng.permutation(99).tolist())
    for number in rng.choice(9, rng.integers(1, 4), replace=False).tolist():
        y, x = rng.integers(20, 50, 2).tolist()
        name = f"{'camera/' * (number % 2)}{number}.png"
        images.append(dict(id=number, file_name=name, height=y, width=x))
        for _ in range(rng.integers(1, 4)):
            w, h = rng.integers(4, (x // 2, y // 2)).tolist()
            left, top = rng.integers(0, (x - w, y - h)).tolist()
            outline = [left, top, left + w, top, left + w, top + h, left, top + h]
            mask = np.zeros((y, x), dtype=np.uint8, order="F")
            mask[top : top + h, left : left + w] = 1
            packed = encoding.encode(mask)["counts"].decode()
            edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=2))
            runs = np.diff(edges, prepend=0).tolist()
            counts = [dict(size=[y, x], counts=runs), dict(size=[y, x], counts=packed)]
            shape = [[outline], *counts][rng.integers(3)]
            annotations.append(
                dict(
                    id=next(ids),
                    image_id=number,
                    category_id=int(rng.choice(categories)),
                    area=w * h,
                    bbox=[left, top, w, h],
                    segmentation=shape,
                )
            )
    return dict(
        images=images,
        annotations=annotations,
        categories=[dict(id=i, name=f"class {i}") for i in categories],
    )


JUNK = (None, True, 0, -1, 1.5, "", "x", "0", [], {}, [1], float("nan"), float("inf"), 10**30, 1e-3)


def damage(contents, rng):
    """Replaces, repeats or takes away something in a nest of dictionaries and lists, or a box."""
    annotation = contents["annotations"][0]
    x, y, w, h = annotation["bbox"]
    boxes = [[x, y, x + w, y + h], [x + w / 2, y + h / 2, w, h], [x / 99, y / 99, w / 99, h / 99],
             [y, x, h, w], [x - 99, y, w, h], [x, y, -w, h], [x, y, w]]  # fmt: skip
    if rng.random() < 0.3:
        annotation["bbox"] = boxes[rng.integers(len(boxes))]
        return
    where, key = contents, str(rng.choice(["images", "annotations", "categories"]))
    while isinstance(where[key], (dict, list)) and where[key] and rng.random() < 0.9:
        where = where[key]
        key = (
            list(where)[rng.integers(len(where))]
            if isinstance(where, dict)
            else int(rng.integers(len(where)))
        )
    act = rng.integers(4)
    if act == 0 and isinstance(where[key], str):
        where[key] = where[key][:-1]
    elif act == 1 and isinstance(where, list):
        where.insert(key, where[key])
    elif act == 2:
        del where[key]
    else:
        where[key] = JUNK[rng.integers(len(JUNK))]


def perfect_scores(root, contents):
    """Of what a detector learns from, as what it found."""
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(contents))
    data = detection.CocoObjects(str(root), "val")
    learned = wrap_dataset_for_transforms_v2(data, ("boxes", "labels", "masks"))
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0).long())
    pairs = []
    for image, target in (learned[i] for i in range(len(data))):
        found = {**none, "masks": torch.zeros(0, *image.shape[1:]), **target}
        pairs.append((image, dict(found, scores=torch.ones(len(found["boxes"])))))
    return detection.scores(Answers(pairs), data, HERE)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
def test_a_damaged_file_is_one_line_and_any_other_gives_perfect_detections_a_score_of_one(tmp_path):
    refused = 0
    for seed in range(300):
        rng, root = np.random.default_rng(seed), tmp_path / str(seed)
        contents = a_small_file(rng)
        (root / "annotations").mkdir(parents=True)
        for i, image in enumerate(contents["images"]):
            save(root / "val2017" / image["file_name"], photo(i, image["height"], image["width"]))
        if damaged := seed % 4 > 0:
            damage(contents, rng)
        try:
            scores = perfect_scores(root, contents)
            assert (scores["box_ap"], scores["mask_ap"]) == pytest.approx((1, 1)), seed
        except ValueError as error:
            assert damaged and "\n" not in str(error), seed
            refused += 1
    assert refused > 100


def test_every_rank_scores_its_own_images():
    data = [(torch.full((1,), i), i) for i in range(7)]
    places = [Place(torch.device("cpu"), rank, 3) for rank in range(3)]
    found = [[(index, label) for index, (_, label) in share(data, place, 0)] for place in places]
    assert found == [[(i, i) for i in part] for part in ((0, 3, 6), (1, 4), (2, 5))]
