"""evaluate.py: the commands, from options to tables, JSON and refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from trained import COLORS, K, save_checkpoint

import evaluate
from measures import labels
from measures.metrics import IGNORE

# pycocotools is older than numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


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
        for kind, array in (("images", image), ("labels", label.astype(np.uint8))):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "data" / kind / f"{i}.png")
    return tmp_path / "data"


def bsds_tree(root, *values):
    """BSDS with one image per value, whose segments are 0 and the value."""
    for number, value in enumerate(values):
        for kind in ("images", "segments"):
            (root / kind / "val").mkdir(parents=True, exist_ok=True)
            pixels = np.full((40, 44), value, np.uint8)
            pixels[:20] = value if value == IGNORE else 0
            Image.fromarray(pixels).save(root / kind / "val" / f"{number}.png")
    return ["--dataset", "bsds", "--data-dir", root, "--size", 32]


def run(*argv, capsys):
    """Exit status, the JSON object (None on failure), the text for people, the error lines."""
    status = evaluate.main([str(word) for word in (*argv, "--json", "-")])
    out, err = capsys.readouterr()
    if status:
        return status, None, out, err
    return status, json.loads(out), err, ""


def refusal(*argv, capsys):
    """The one line of a command that is refused with status 2."""
    status, _, out, err = run(*argv, capsys=capsys)
    assert status == 2 and err.startswith("evaluate.py: ") and err.count("\n") == 1 and not out
    return err


# ------------------------------------------------------------------------------------- segmentation


def test_the_command_measures_any_labeled_folder_whatever_the_batch_and_the_workers(
    trained, folder, tmp_path, capsys
):
    results = []
    for options in (["--batch-size", 1], ["--batch-size", 3, "--workers", 1]):
        status, result, text, _ = run(
            "segmentation", trained, "--data-dir", folder, "--size", 32, *options, capsys=capsys
        )
        assert status == 0 and result["images"] == 7 and result["num_prototypes"] == K
        assert "k-means on RGB" in text
        results.append(result["sizes"]["32"])
    assert results[0]["rgb_kmeans"] == results[1]["rgb_kmeans"]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=1e-3)


def test_the_command_goes_through_a_tree_of_coco_stuff(trained, tmp_path, capsys):
    for name, fine in (("000000000002", 181), ("000000000001", 91), ("000000000003", 0)):
        for path, array in (
            (f"val2017/{name}.jpg", np.full((360, 370, 3), fine)),
            (f"stuffthingmaps_trainval2017/val2017/{name}.png", np.full((360, 370), fine)),
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / path)
    where = ["--dataset", "coco_stuff", "--data-dir", tmp_path]
    status, result, text, _ = run("segmentation", trained, *where, capsys=capsys)
    assert status == 0 and result["images"] == 2 and result["classes"] == 27
    assert list(result["sizes"]) == ["320", "224"]
    assert "NOT the published list" in result["notice"] in text
    assert set(result["sizes"]["320"]["iou"]) == set(labels.COARSE_NAMES)


def test_toy_scenes_need_no_folder_and_come_as_they_are_drawn_whatever_the_size_of_the_views(
    trained, capsys
):
    status, result, _, _ = run(
        "segmentation", trained, "--toy-scenes", 5, "--limit", 3, capsys=capsys
    )
    assert status == 0 and result["dataset"] == "toy" and result["images"] == 3
    assert list(result["sizes"]) == ["64"]


@pytest.mark.parametrize("dataset, said", [("folder", True), ("toy", False)])
def test_photographs_that_are_measured_on_toy_scenes_are_a_note(
    dataset, said, trained, tmp_path, capsys
):
    saved = torch.load(trained, weights_only=True)
    saved["config"] = dict(saved["config"], dataset=dataset)
    torch.save(saved, tmp_path / "last.pth")
    _, _, text, _ = run("segmentation", tmp_path, "--toy-scenes", 2, capsys=capsys)
    assert (f"trained on {dataset}, measured on toy scenes" in text) == said


def test_the_adjusted_rand_index_is_called_adjusted(trained, tmp_path, capsys):
    _, result, text, _ = run("segmentation", trained, *bsds_tree(tmp_path / "b", 9), capsys=capsys)
    assert "adjusted Rand" in text and "Rand index" not in text
    assert result["sizes"]["32"]["adjusted_rand_index"] < 0.5


@pytest.mark.parametrize("options", [[], ["--num-classes", 3]])
def test_labels_without_a_class_are_one_line_and_not_a_table_of_zeros(
    options, trained, folder, capsys
):
    for file in (folder / "labels").iterdir():
        Image.fromarray(np.full_like(np.asarray(Image.open(file)), IGNORE)).save(file)
    for command in ("segmentation", "probe"):
        line = refusal(
            command, trained, "--data-dir", folder, "--size", 32, *options, capsys=capsys
        )
        assert "nothing is labeled" in line


def test_segments_without_a_labeled_pixel_are_one_line(trained, tmp_path, capsys):
    where = bsds_tree(tmp_path / "b", IGNORE)
    assert "nothing is labeled" in refusal("segmentation", trained, *where, capsys=capsys)


def test_a_single_wrong_id_is_named_with_its_file_and_what_to_do(trained, folder, capsys):
    spoil_label(folder, np.full((37, 37), 200, np.uint8))
    status, result, text, _ = run(
        "segmentation", trained, "--data-dir", folder, "--size", 32, capsys=capsys
    )
    assert status == 0 and result["classes"] == 201
    (line,) = (line for line in text.splitlines() if line.startswith("note: "))
    for words in (
        "201 classes",
        "ids 3 to 199 occur in no label",
        "200 first in",
        str(folder / "labels" / "3.png"),
        "--num-classes 3",
    ):
        assert words in line
    assert text.count("without a pixel") == 1 and len(text.splitlines()) < 20  # not 197 rows


# -------------------------------------------------------------------------------------------- slots


def test_slots_come_as_text_as_json_and_as_a_figure_beside_the_checkpoint(
    trained, tmp_path, capsys
):
    for options, file in (
        ([], tmp_path / "slots.png"),
        (["--output", tmp_path / "new" / "p.png"], tmp_path / "new" / "p.png"),
    ):
        status, result, text, _ = run("slots", trained, "--limit", 6, *options, capsys=capsys)
        assert status == 0 and result["images"] == sum(result["images_with"]) == 6
        assert len(result["active"]) == K and result["files"] == [str(file)]
        assert f"{sum(result['active']) / 6:.2f} slots are occupied" in text
        assert "most often" in text
        assert Image.open(file).width > 800


# ------------------------------------------------------------------------------------------- probes


def test_probe_compares_with_a_random_backbone_and_learns_from_few_labels(trained, capsys):
    status, result, text, _ = run(
        "probe", trained, "--toy-scenes", 6, "--labeled", 3, capsys=capsys
    )
    assert status == 0 and result["labeled_images"] == 3 and result["images"] == 6
    assert "random backbone" in text and result["trained"] != result["random_backbone"]
    for row in ("trained", "random_backbone"):
        for kind in ("linear", "neighbors"):
            assert 0 < result[row][kind]["miou"] <= 1 and len(result[row][kind]["iou"]) == 8


def test_a_backbone_is_probed_as_the_whole_network_is(trained, tmp_path, capsys):
    results = [
        run("probe", path, "--toy-scenes", 6, capsys=capsys)[1]
        for path in (trained, tmp_path / "backbone.pth")
    ]
    for row in ("trained", "random_backbone"):
        assert results[0][row] == results[1][row]


@pytest.mark.parametrize("command", ["segmentation", "slots"])
def test_a_backbone_alone_has_no_groups_and_the_line_names_what_can_be_done(
    command, trained, tmp_path, capsys
):
    line = refusal(command, tmp_path / "backbone.pth", capsys=capsys)
    assert "backbone only (tiny)" in line and "prototypes" in line
    assert "last.pth" in line and "evaluate.py probe" in line


def test_a_probe_never_meets_an_image_in_the_test_that_it_learned_from(trained, folder, capsys):
    options = ["probe", trained, "--data-dir", str(folder), "--dataset", "folder", "--size", "32"]
    parts = evaluate.open_parts(evaluate.commands().parse(options))
    learned, tested = ({part.images.name(i) for i in part.indices} for part in parts)
    assert not learned & tested and len(learned | tested) == 7
    status, result, _, _ = run(*options, capsys=capsys)
    assert status == 0
    assert (result["labeled_images"], result["images"]) == (len(learned), len(tested))
    assert "learns on the split train" in refusal(*options, "--split", "train", capsys=capsys)


def test_a_probe_is_refused_where_the_part_to_test_on_is_among_the_images_to_learn_from(
    trained, folder, capsys
):
    for kind in ("images", "labels"):
        (folder / kind / "test").mkdir()
        for name in ("0.png", "1.png"):
            (folder / kind / name).rename(folder / kind / "test" / name)
    where = ["probe", trained, "--data-dir", folder, "--size", 32]
    line = refusal(*where, "--split", "test", capsys=capsys)
    assert "images of the split test are among those to learn from" in line
    assert run(*where, capsys=capsys)[0] == 0


def test_a_probe_whose_parts_disagree_on_the_classes_is_one_line(trained, folder, capsys):
    for part, ids in (("train", (0, 6)), ("val", (0, 2))):
        for kind, name in (("images", "0.png"), ("labels", "0.png")):
            (folder / kind / part).mkdir()
            shape = (34, 40, 3) if kind == "images" else (34, 40)
            pixels = np.full(shape, ids[0], np.uint8)
            pixels[5:] = ids[1]
            Image.fromarray(pixels).save(folder / kind / part / name)
    line = refusal("probe", trained, "--data-dir", folder, "--dataset", "folder", capsys=capsys)
    assert "the split train has 7 classes and the one to test on 3" in line


def test_a_probe_of_segments_without_names_is_refused(trained, tmp_path, capsys):
    for split in ("train", "val"):
        for kind in ("images", "segments"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("L", (9, 9)).save(tmp_path / kind / split / "a.png")
    line = refusal("probe", trained, "--dataset", "bsds", "--data-dir", tmp_path, capsys=capsys)
    assert "have no names" in line


# ------------------------------------------------------------------------------------- wrong input


def spoil_label(folder, array):
    Image.fromarray(array).save(folder / "labels" / "3.png")


WRONG = {
    "a missing checkpoint": (lambda f: ["segmentation", f / "none.pth"], "no checkpoint"),
    "a backbone without prototypes":
        (lambda f: ["slots", f.parent / "backbone.pth"], "backbone only"),
    "a folder that is not there":
        (lambda f: ["segmentation", "CHECKPOINT", "--data-dir", f / "no"], "no folder"),
    "no folder at all":
        (lambda f: ["segmentation", "CHECKPOINT", "--dataset", "voc"], "--data-dir is missing"),
    "an unknown data set":
        (lambda f: ["probe", "CHECKPOINT", "--dataset", "mars"], "invalid choice"),
    "a size of nothing": (lambda f: ["segmentation", "CHECKPOINT", "--size", 0], "at least 32"),
    "a size below that of training":
        (lambda f: ["segmentation", "CHECKPOINT", "--data-dir", f, "--size", 64, 31],
         "argument --size: 31 px are too few: it takes at least 32"),
    "slots of small images":
        (lambda f: ["slots", "CHECKPOINT", "--data-dir", f / "images", "--size", 2],
         "argument --size: 2 px are too few"),
    "a probe of small images":
        (lambda f: ["probe", "CHECKPOINT", "--data-dir", f, "--size", 8],
         "argument --size: 8 px are too few"),
    "no number":
        (lambda f: ["segmentation", "CHECKPOINT", "--limit", "many"], "invalid whole value"),
    "an empty folder":
        (lambda f: ["slots", "CHECKPOINT", "--data-dir", f / "empty"], "no such folder"),
    "a missing label":
        (lambda f: (f / "labels" / "3.png").unlink(), "1 of 7 labels are missing"),
    "an id outside the classes":
        (lambda f: spoil_label(f, np.full((37, 37), 9, np.uint8)), "id 9, outside 0..2"),
    "unequal sizes":
        (lambda f: spoil_label(f, np.zeros((37, 38), np.uint8)),
         "37 x 37 but its label is 38 x 37"),
    "an image as the checkpoint":
        (lambda f: ["slots", f / "images" / "3.png"], "is an image where the checkpoint"),
    "an image as the list":
        (lambda f: ["segmentation", "CHECKPOINT", "--list", f / "images" / "3.png"],
         "is an image where a text file"),
    "an image as the folder":
        (lambda f: ["segmentation", "CHECKPOINT", "--data-dir", f / "images" / "3.png"],
         "is an image where a folder"),
    "a network that a backbone lacks":
        (lambda f: ["probe", f.parent / "backbone.pth", "--network", "student"], "no student"),
}  # fmt: skip


@pytest.mark.parametrize("case, workers", [(case, 0) for case in WRONG] + [("unequal sizes", 1)])
def test_wrong_input_ends_with_one_line_and_exit_code_2(case, workers, trained, folder, capsys):
    spoil, message = WRONG[case]
    argv = spoil(folder)
    if not isinstance(argv, list):
        argv = [
            "segmentation",
            "CHECKPOINT",
            "--data-dir",
            folder,
            "--num-classes",
            3,
            "--size",
            32,
        ]
    argv = [trained if word == "CHECKPOINT" else word for word in argv]
    assert message in refusal(*argv, "--workers", workers, capsys=capsys)


def test_the_help_advises(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["segmentation", "--help"])
    assert "sizes and k come from it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_shell_gets_the_exit_code():
    failed = subprocess.run(
        [sys.executable, evaluate.__file__, "slots", "none.pth"], capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("evaluate.py: no checkpoint")
    assert not failed.stdout


# --------------------------------------------------------------------------------- real photographs


@pytest.mark.skipif(
    "SLOTCON_BSDS" not in os.environ,
    reason="needs SLOTCON_BSDS, a folder of photographs and segments",
)
def test_photographs_with_segments_are_measured(trained, capsys):
    where = ["--dataset", "bsds", "--data-dir", os.environ["SLOTCON_BSDS"]]
    status, result, _, _ = run(
        "segmentation", trained, *where, "--limit", 3, "--size", 64, capsys=capsys
    )
    assert status == 0 and -1 < result["sizes"]["64"]["adjusted_rand_index"] < 1


@pytest.mark.skipif(
    "SLOTCON_TINY_COCO" not in os.environ, reason="needs SLOTCON_TINY_COCO, 100 COCO photographs"
)
def test_photographs_with_instances_are_measured_and_probed(trained, capsys):
    where = ["--dataset", "coco_things", "--data-dir", os.environ["SLOTCON_TINY_COCO"]]
    for command in ("segmentation", "probe"):
        status, result, _, _ = run(
            command, trained, *where, "--limit", 3, "--size", 64, capsys=capsys
        )
        assert status == 0 and result["images"] == 3
