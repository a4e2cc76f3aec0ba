"""evaluate.py: the commands, from options to tables, JSON and refusals."""

import json
import os

import numpy as np
import pytest
import torch
from test_datasets import draw_coco_stuff

import evaluate
import toy
from measures.layouts import COARSE_NAMES, IGNORE
from trained import COLORS, K, save_checkpoint, write


@pytest.fixture
def trained(tmp_path):
    return str(save_checkpoint(tmp_path / "last.pth"))


@pytest.fixture
def folder(tmp_path):
    """Seven images of unequal sizes with labels of three classes."""
    for i in range(7):
        label = np.random.default_rng(i).integers(0, 3, (34 + i, 40 - i))
        image = COLORS[torch.from_numpy(label)].numpy()
        label[0] = IGNORE
        write(tmp_path / "data" / "images" / f"{i}.png", image)
        write(tmp_path / "data" / "labels" / f"{i}.png", label)
    return tmp_path / "data"


def run(*argv, capsys):
    """Exit status, the JSON object (None on failure), the text for people, the error lines."""
    status = evaluate.main([str(word) for word in (*argv, "--json", "-")])
    out, err = capsys.readouterr()
    return (status, None, out, err) if status else (status, json.loads(out), err, "")


def refusal(*argv, capsys):
    """The one line of a command that is refused with status 2, behind what it would measure."""
    status, _, out, err = run(*argv, capsys=capsys)
    *before, line = err.splitlines()
    assert status == 2 and line.startswith("evaluate.py: ") and not out
    assert all(each.startswith("measures ") for each in before)
    return line


def bsds_tree(root, *ids):
    """BSDS with an image in each of two parts, which is cut into columns of these ids."""
    pixels = np.tile(np.repeat(ids, 40), (40, 1))
    for kind in ("images/train", "images/val", "segments/train", "segments/val"):
        write(root / kind / "0.png", pixels)
    return ["--dataset", "bsds", "--data-dir", root, "--size", 32]


def test_any_labeled_folder_is_measured_whatever_the_batch_and_the_workers(trained, folder, capsys):
    results = []
    for reading in (["--batch-size", 1], ["--batch-size", 3, "--workers", 1]):
        where = ["segmentation", trained, "--data-dir", folder, "--size", 32]
        status, result, text, _ = run(*where, *reading, capsys=capsys)
        assert status == 0 and result["images"] == 7 and result["num_prototypes"] == K
        assert "k-means on RGB" in text
        results.append(result["sizes"]["32"])
    assert results[0]["rgb_kmeans"] == results[1]["rgb_kmeans"]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=1e-3)


def test_a_tree_of_coco_stuff_is_measured_as_its_protocol_says(trained, tmp_path, capsys):
    draw_coco_stuff(tmp_path)
    where = ["--dataset", "coco_stuff", "--data-dir", tmp_path]
    status, result, text, _ = run("segmentation", trained, *where, capsys=capsys)
    assert status == 0 and result["images"] == 3 and result["classes"] == 27
    assert list(result["sizes"]) == ["320", "224"]
    assert "NOT the published list" in result["notice"] in text
    assert set(result["sizes"]["320"]["iou"]) == set(COARSE_NAMES)


@pytest.mark.parametrize("dataset, noted", [("folder", True), ("toy", False)])
def test_toy_scenes_come_as_drawn_and_are_noted_after_photographs(dataset, noted, tmp_path, capsys):
    trained = save_checkpoint(tmp_path / "last.pth", dataset=dataset)
    status, result, text, _ = run("segmentation", trained, "--limit", 3, capsys=capsys)
    assert status == 0 and result["dataset"] == "toy" and result["images"] == 3
    assert list(result["sizes"]) == ["64"]
    assert ("the network learned from photographs and sees toy scenes" in text) == noted


def test_segments_without_classes_have_an_adjusted_rand_index(trained, tmp_path, capsys):
    where = bsds_tree(tmp_path / "b", 0, 9)
    _, result, text, _ = run("segmentation", trained, *where, capsys=capsys)
    assert "adjusted Rand" in text and result["sizes"]["32"]["adjusted_rand_index"] < 0.5
    assert "use segmentation" in refusal("probe", trained, *where, capsys=capsys)
    where = bsds_tree(tmp_path / "c", IGNORE)
    assert "nothing is labeled" in refusal("segmentation", trained, *where, capsys=capsys)


def test_a_wrong_id_is_a_class_where_ids_are_counted_and_refused_elsewhere(trained, folder, capsys):
    write(folder / "labels" / "3.png", np.full((37, 37), 200))
    where = ["segmentation", trained, "--data-dir", folder, "--size", 32]
    _, result, text, _ = run(*where, capsys=capsys)
    assert result["classes"] == 201 and "197 classes" in text
    assert len(text.splitlines()) < 20  # not 197 rows
    assert "has id 200" in refusal(*where, "--num-classes", 3, "--workers", 1, capsys=capsys)


def test_slots_come_as_text_and_json_and_what_was_left_out_is_said(trained, folder, capsys):
    (folder / "images" / "a.heic").touch()
    where = ["--data-dir", folder / "images", "--limit", 6]
    of_student = run("slots", trained, "--network", "student", *where, capsys=capsys)[1]
    status, result, text, _ = run("slots", trained, *where, capsys=capsys)
    assert status == 0 and result["images"] == 6 and len(result["active"]) == K
    assert result["active"] != of_student["active"]
    assert f"{sum(result['active']) / 6:.2f} slots are occupied" in text and "most often" in text
    assert "7 images: " in text and "left out: 1 .heic (first a.heic)" in text


def test_a_backbone_is_probed_as_its_network_is_beside_a_random_one(trained, tmp_path, capsys):
    results = []
    for words in ([trained], [tmp_path / "backbone.pth"], [trained, "--network", "student"]):
        status, result, text, _ = run("probe", *words, "--limit", 6, capsys=capsys)
        assert status == 0 and result["labeled_images"] == result["images"] == 6
        assert "four parts: to learn and" in text and "random backbone" in text
        assert result["trained"] != result["random_backbone"]
        results.append([result["trained"], result["random_backbone"]])
    assert results[0] == results[1] and results[0][0] != results[2][0]
    scores = [row[kind] for row in results[0] for kind in ("linear", "neighbors")]
    assert all(0 < s["miou"] <= 1 and len(s["iou"]) == len(toy.CLASS_NAMES) for s in scores)


def test_a_probe_is_never_tested_on_an_image_that_it_has_learned_from(trained, folder, capsys):
    options = ["probe", trained, "--data-dir", folder, "--size", 32]
    status, result, _, _ = run(*options, capsys=capsys)
    assert status == 0 and (result["labeled_images"], result["images"]) == (5, 2)
    assert "learns on the split train" in refusal(*options, "--split", "train", capsys=capsys)
    for kind in ("images", "labels"):
        (folder / kind / "test").mkdir()
        (folder / kind / "0.png").rename(folder / kind / "test" / "0.png")
    line = refusal(*options, "--split", "test", capsys=capsys)
    assert "images to test on are among those to learn from" in line
    for part, number in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            write(folder / kind / part / "0.png", np.eye(40, dtype=int) * number)
    assert "7 classes to learn and 3 to test" in refusal(*options, capsys=capsys)


# FOLDER and CHECKPOINT stand for the fixtures, BACKBONE for the backbone.pth beside the checkpoint
WRONG = [
    ("segmentation none.pth", "no checkpoint"),
    ("segmentation BACKBONE", "measure its features with evaluate.py probe"),
    ("probe BACKBONE --network student", "no student"),
    ("segmentation CHECKPOINT --data-dir FOLDER/no", "FOLDER/no/images; --dataset folder expects"),
    ("segmentation CHECKPOINT --dataset voc", "--data-dir is missing"),
    ("probe CHECKPOINT --dataset mars", "--dataset: invalid choice: 'mars' (choose from "),
    ("slots CHECKPOINT --data-dir FOLDER/empty", "no such folder"),
]


@pytest.mark.parametrize("command, message", WRONG)
def test_wrong_input_ends_with_one_line_and_exit_code_2(command, message, trained, folder, capsys):
    words = command.replace("CHECKPOINT", trained).replace("FOLDER", str(folder))
    words = words.replace("BACKBONE", str(folder.parent / "backbone.pth"))
    assert message.replace("FOLDER", str(folder)) in refusal(*words.split(), capsys=capsys)


@pytest.mark.parametrize("variable, options, key", [
    ("SLOTCON_BSDS", ["--dataset", "bsds"], "adjusted_rand_index"),
    ("SLOTCON_MSRC", [], "miou"),
])  # fmt: skip
def test_labeled_photographs_are_measured(variable, options, key, trained, capsys):
    if variable not in os.environ:
        pytest.skip(f"needs {variable}, a folder of labeled photographs")
    where = [*options, "--data-dir", os.environ[variable], "--limit", 3, "--size", 64]
    status, result, _, _ = run("segmentation", trained, *where, capsys=capsys)
    assert status == 0 and result["images"] == 3 and 0 < result["sizes"]["64"][key] < 1
