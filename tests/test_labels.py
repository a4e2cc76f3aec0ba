"""labels.py: images with a label for every pixel."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

import toy
from measures import labels
from measures.metrics import IGNORE

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation"
)  # pycocotools, older than numpy 2

THING, STUFF = 0, 91  # fine ids: person, banner


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def photo(height, width, value=90):
    return np.full((height, width, 3), value, dtype=np.uint8)


def folder_of(tmp_path, ids=((0, 1), (2, 255)), height=6, width=8):
    """images/ and labels/ with one image per row of ids, left and right half."""
    for number, (left, right) in enumerate(ids):
        label = np.full((height, width), left)
        label[:, width // 2 :] = right
        write(tmp_path / "images" / "day" / f"{number}.png", photo(height, width, 20 * number))
        write(tmp_path / "labels" / "day" / f"{number}.png", label)
    return tmp_path


def test_the_table_has_the_class_sizes_of_the_protocol():
    sizes = [6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8, 2, 6, 4, 11, 4, 11, 7, 2, 6, 11, 9, 2, 6, 5, 5]
    table = labels.FINE_TO_COARSE
    assert len(labels.COARSE_NAMES) == 27 and len(set(labels.COARSE_NAMES)) == 27
    assert np.bincount(table[:182], minlength=27).tolist() == sizes
    assert table[255] == IGNORE and (table[182:255] == -1).all()
    known = {
        0: "person",
        16: "animal",
        45: "kitchen",
        181: "solid",
    }  # person, cat, wine glass, wood
    assert {fine: labels.COARSE_NAMES[table[fine]] for fine in known} == known
    assert (table[:91] < labels.FIRST_STUFF).all() and (table[91:182] >= labels.FIRST_STUFF).all()


@pytest.mark.parametrize(
    "height, width, stuff_share, ignored_share, kept",
    [
        (360, 400, 0.75, 0.0, True),
        (400, 360, 1.0, 0.0, True),
        (359, 400, 1.0, 0.0, False),
        (400, 359, 1.0, 0.0, False),
        (360, 400, 0.745, 0.0, False),
        (360, 400, 0.74, 0.26, False),  # pixels without a label count as pixels that are not stuff
    ],
)
def test_the_curated_rule_keeps_large_images_of_mostly_stuff(
    height, width, stuff_share, ignored_share, kept
):
    fine = np.full(height * width, THING)
    fine[: round(stuff_share * fine.size)] = STUFF
    fine[fine.size - round(ignored_share * fine.size) :] = IGNORE
    assert labels.is_curated(fine.reshape(height, width)) == kept


def test_the_digest_is_that_of_a_file_with_one_id_per_line():
    assert labels.list_digest(["000000000139", "000000000285"]) == (
        hashlib.sha256(b"000000000139\n000000000285\n").hexdigest())  # fmt: skip


def coco_stuff_tree(root, split="val2017"):
    """Three curated images out of order, one too small, one of things, one without a image."""
    cases = {"000000000300": (360, 364, STUFF), "000000000100": (366, 360, 181),
             "000000000200": (361, 362, 100),
             "000000000400": (300, 500, STUFF), "000000000500": (370, 380, THING)}  # fmt: skip
    for name, (height, width, fine) in cases.items():
        label = np.full((height, width), fine)
        label[:10] = 255
        write(root / split / f"{name}.jpg", photo(height, width))
        write(root / "stuffthingmaps_trainval2017" / split / f"{name}.png", label)
    return root


def test_coco_stuff_is_read_with_the_curated_list_rebuilt_in_order(tmp_path):
    found = labels.open_labeled("coco_stuff", coco_stuff_tree(tmp_path))
    assert [found.images.name(i) for i in range(len(found))] == [
        f"000000000{n}.jpg" for n in (100, 200, 300)
    ]
    image, label = found[0]
    assert image.shape == (3, 366, 360) and label.unique().tolist() == [24, 255]
    assert "NOT the published list" in found.notice


def test_coco_stuff_takes_a_list_from_a_file_and_knows_the_published_one(tmp_path):
    root = coco_stuff_tree(tmp_path)
    (tmp_path / "ids.txt").write_text("000000000300\n000000000400\n")
    found = labels.open_labeled("coco_stuff", root, list_file=tmp_path / "ids.txt")
    assert [found.images.name(i) for i in range(len(found))] == [
        "000000000300.jpg",
        "000000000400.jpg",
    ]
    published = labels.list_digest(["000000000300", "000000000400"])
    found = labels.open_labeled(
        "coco_stuff", root, list_file=tmp_path / "ids.txt", published=published)
    assert "NOT" not in found.notice


def test_the_published_list_is_the_one_of_the_protocol():
    assert (
        labels.PUBLISHED_LIST == "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655"
    )


def test_unknown_fine_ids_are_refused(tmp_path):
    root = coco_stuff_tree(tmp_path)
    write(
        root / "stuffthingmaps_trainval2017" / "val2017" / "000000000100.png",
        np.full((366, 360), 200),
    )
    (tmp_path / "ids.txt").write_text("000000000100\n")
    with pytest.raises(ValueError, match=r"000000000100.jpg has id -1|id 200"):
        labels.open_labeled("coco_stuff", root, list_file=tmp_path / "ids.txt")[0]


def test_coco_things_are_painted_small_over_large(tmp_path):
    def box(x, y, side, category):
        polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        return dict(
            segmentation=[polygon], area=side * side, category_id=category, image_id=7, iscrowd=0
        )

    shapes = [dict(box(4, 4, 4, 1), id=1), dict(box(0, 0, 12, 3), id=2)]  # a person on a car
    images = [dict(id=7, file_name="a.jpg", height=16, width=20), dict(id=8, file_name="b.jpg")]
    contents = dict(images=images,
                    annotations=shapes, categories=[dict(id=1), dict(id=3)])  # fmt: skip
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(contents))
    write(tmp_path / "val2017" / "a.jpg", photo(16, 20))
    found = labels.open_labeled("coco_things", tmp_path)
    _, label = found[0]
    assert len(found) == 1 and len(found.class_names) == 12
    assert label[6, 6] == labels.COARSE_NAMES.index("person") and label[
        2, 2
    ] == labels.COARSE_NAMES.index("vehicle")
    assert label[15, 19] == IGNORE


def test_voc_labels_are_palette_indices_of_the_listed_images(tmp_path):
    root = tmp_path / "VOC2012"
    write(root / "JPEGImages" / "x.jpg", photo(9, 11))
    label = Image.fromarray(np.full((9, 11), 20, dtype=np.uint8))
    label.putpalette([i % 256 for i in range(768)])
    (root / "SegmentationClass").mkdir()
    label.save(root / "SegmentationClass" / "x.png")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("x\n")
    for start in (tmp_path, root):
        found = labels.open_labeled("voc", start)
        assert found[0][1].unique().tolist() == [20] and found.class_names[20] == "tvmonitor"


def test_bsds_segments_have_no_names_and_any_number(tmp_path):
    write(tmp_path / "images" / "val" / "p.jpg", photo(9, 11))
    write(tmp_path / "segments" / "val" / "p.png", np.arange(99).reshape(9, 11))
    found = labels.open_labeled("bsds", tmp_path)
    assert found.class_names == () and found[0][1].max() == 98


def test_any_folder_pairs_equal_names_and_finds_the_number_of_classes(tmp_path):
    found = labels.open_labeled("folder", folder_of(tmp_path))
    assert len(found) == 2 and found.class_names == ("class 0", "class 1", "class 2")
    image, label = found[1]
    assert image[0, 0, 0] == 20 and label[0].tolist() == [2, 2, 2, 2, 255, 255, 255, 255]


def test_a_folder_names_its_classes_in_a_file(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\n")
    assert labels.open_labeled("folder", tmp_path).class_names == ("sky", "sea", "sand")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n \n"])
def test_neither_blank_lines_at_the_end_nor_a_mark_at_the_start_belong_to_the_classes(
    tmp_path, mark, end
):
    folder_of(tmp_path)
    (tmp_path / "classes.txt").write_bytes(f"{mark}sky\r\nsea \nпляж{end}".encode())
    assert labels.open_labeled("folder", tmp_path).class_names == ("sky", "sea", "пляж")


def test_a_file_of_blank_lines_names_no_class_and_the_ids_are_counted(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "classes.txt").write_text("\n \n")
    assert labels.open_labeled("folder", tmp_path).class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("text, message", [
    ("sky\n\nsand\n", "line 2 is blank, but it names id 1"),
    ("\nsky\nsand\n", "line 1 is blank, but it names id 0"),
    ("sky\nthing\nthing \ntree\n", "lines 2 and 3 are both 'thing'"),
])  # fmt: skip
def test_a_class_without_a_name_of_its_own_is_refused_with_its_line(tmp_path, text, message):
    folder_of(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        labels.open_labeled("folder", tmp_path)
    assert str(tmp_path / "classes.txt") in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_parts_is_split_into_fifths_that_share_no_image(tmp_path):
    folder_of(tmp_path, [(0, 1)] * 11)
    train, val = (labels.open_labeled("folder", tmp_path, split) for split in ("train", "val"))
    assert sorted(train.indices + val.indices) == list(range(11)) and val.indices == (0, 5, 10)
    assert len(labels.open_labeled("folder", tmp_path)) == 11


def test_a_folder_with_parts_is_read_by_part(tmp_path):
    for part in ("train", "val"):
        write(tmp_path / "images" / part / f"{part}.png", photo(6, 8))
        write(tmp_path / "labels" / part / f"{part}.png", np.zeros((6, 8)))
    assert labels.open_labeled("folder", tmp_path, "val").images.name(0) == "val.png"


@pytest.mark.parametrize("there, absent", [("train", "val"), ("val", "train")])
def test_of_train_and_val_the_missing_one_is_refused_since_it_would_share_images_with_the_other(
    tmp_path, there, absent
):
    for part in ("training", there):
        for number in range(6):
            write(tmp_path / "images" / part / f"{part}{number}.png", photo(6, 8))
            write(tmp_path / "labels" / part / f"{part}{number}.png", np.zeros((6, 8)))
    with pytest.raises(ValueError) as caught:
        labels.open_labeled("folder", tmp_path, absent)
    assert str(caught.value) == (f"{tmp_path} has images/{there} but no images/{absent}: add it, "
                                 "or put all images into images/")
    assert len(labels.open_labeled("folder", tmp_path)) == 12  # to measure on everything
    for part in ("training", there):
        assert len(labels.open_labeled("folder", tmp_path, part)) == 6


def test_a_subset_of_a_subset_keeps_its_places(tmp_path):
    found = labels.open_labeled("folder", folder_of(tmp_path, [(i, i) for i in range(7)]))
    assert [int(pair[1][0, 0]) for pair in found.subset([6, 4, 2]).subset([2, 0])] == [2, 6]


def test_toy_scenes_come_with_their_own_truth_and_from_seeds_no_run_has():
    found = labels.open_labeled("toy", None, count=3, size=32)
    image, label = found[2]
    scene = toy.scene(labels.UNSEEN, 2, size=32)
    assert (image.numpy() == scene.image.transpose(2, 0, 1)).all() and (
        label.numpy() == scene.semantic
    ).all()
    assert labels.UNSEEN > 2**31
    assert not labels.open_labeled("toy", None, "train", count=3, size=32)[2][0].equal(image)


def test_the_square_keeps_image_and_label_on_the_same_pixels():
    label = torch.from_numpy(
        np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20)))
    ).long()  # 60 x 80
    image = (label * 20).to(torch.uint8).expand(3, -1, -1)
    small_image, small_label = labels.square((image, label), 24)
    assert small_image.shape == (3, 24, 24) and small_label.shape == (24, 24)
    assert small_label.unique().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    inside = (
        small_image[0].float() / 20 - small_label
    ).abs() < 0.3  # only borders between blocks are blended
    assert inside.float().mean() > 0.7


def test_labels_shrink_as_pillow_does_it():
    label = torch.randint(0, 27, (61, 97), generator=torch.Generator().manual_seed(0))
    _, small = labels.square((torch.zeros(3, 61, 97, dtype=torch.uint8), label), 40)
    pillow = np.array(
        Image.fromarray(label.numpy().astype(np.uint8)).resize((63, 40), Image.NEAREST)
    )
    assert (small.numpy() == pillow[:, 12:52]).all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: (root / "labels" / "day" / "1.png").unlink(),
         r"1 of 2 labels are missing, first .*1\.png"),
        (lambda root: write(root / "labels" / "day" / "0.png", np.zeros((6, 9))),
         r"0\.png is 8 x 6 but its label is 9 x 6"),
        (lambda root: write(root / "labels" / "day" / "0.png", np.full((6, 8), 3)),
         r"label of day/0\.png has id 3, outside 0\.\.2"),
        (lambda root: write(root / "labels" / "day" / "0.png", photo(6, 8)),
         r"0\.png holds colors \(RGB\)"),
        (lambda root: (root / "labels" / "day" / "0.png").write_text("x"),
         r"cannot read the label .*0\.png"),
        (lambda root: (root / "images" / "day" / "0.png").write_bytes(b"\x89PNG no"),
         r"cannot read day/0\.png"),
    ],
)  # fmt: skip
def test_spoiled_images_and_labels_are_named_in_one_line(tmp_path, spoil, message):
    spoil(folder_of(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        labels.open_labeled("folder", tmp_path, num_classes=3)[0]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", [name for name in labels.DATASETS if name != "toy"])
def test_a_wrong_folder_is_answered_with_the_expected_tree(tmp_path, dataset):
    with pytest.raises(ValueError, match="expected") as caught:
        labels.open_labeled(dataset, tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="--data-dir is missing"):
        labels.open_labeled(dataset, None)


# --------------------------------------------------------------------------- classes by counting


def label_files(folder, *labels):
    """A label file per list of ids."""
    for number, ids in enumerate(labels):
        write(folder / f"{number}.png", [ids])
    return [folder / f"{number}.png" for number in range(len(labels))]


def test_ids_without_a_gap_are_counted_without_a_word(tmp_path):
    files = label_files(tmp_path, [0, 2, 255], [1, 3])
    assert labels.count_classes(files) == (4, "")


def test_an_id_after_a_gap_is_named_with_its_file_and_the_number_before_the_gap(tmp_path):
    files = label_files(tmp_path, [0, 1, 2], [2, 2, 200], [200, 1])
    count, line = labels.count_classes(files)
    assert count == 201 and "\n" not in line
    assert "ids 3 to 199 occur in no label" in line and f"200 first in {files[1]}" in line
    assert "--num-classes 3" in line


@pytest.mark.parametrize("ids, words, suggestion", [
    ([1, 2, 3], "id 0 occurs in no label", 4),  # classes from 1 on: nothing is wrong with the rest
    ([0, 2, 3], "id 1 occurs in no label", 1),
    ([0, 2, 3, 9], "ids 4 to 8 occur in no label", 4),  # the widest gap
])  # fmt: skip
def test_the_widest_gap_is_named(tmp_path, ids, words, suggestion):
    _, line = labels.count_classes(label_files(tmp_path, ids))
    assert words in line and line.count(f"--num-classes {suggestion} ") == 1


def test_labels_without_any_class_cannot_be_counted(tmp_path):
    with pytest.raises(ValueError, match="nothing is labeled: all pixels of the 2 label files"):
        labels.count_classes(label_files(tmp_path, [255, 255], [255]))


def test_the_gap_is_in_the_notice_only_where_ids_are_counted(tmp_path):
    folder_of(tmp_path, [(0, 1), (9, 255)])
    assert "ids 2 to 8" in labels.open_labeled("folder", tmp_path).notice
    assert labels.open_labeled("folder", tmp_path, num_classes=10).notice == ""
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    assert labels.open_labeled("folder", tmp_path).notice == ""


def test_a_list_that_is_no_text_is_refused(tmp_path):
    root = coco_stuff_tree(tmp_path)
    (tmp_path / "ids").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="is not a text file: one name per line"):
        labels.open_labeled("coco_stuff", root, list_file=tmp_path / "ids")
