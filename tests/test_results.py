"""measures/results.py: what a run shows at its end."""

import json
from types import SimpleNamespace

from PIL import Image

import toy
from engine.images import ImageFiles
from grouping import GroupingNetwork
from measures import results
from measures.datasets import UNSEEN
from measures.groups import compare_in_memory
from measures.networks import untrained_network
from trained import K


def ended(teacher, folder):
    """A run after its last step."""
    return SimpleNamespace(model=SimpleNamespace(teacher=teacher), folder=folder, seconds=1000.0)


def test_the_numbers_of_a_toy_run_are_those_of_unseen_scenes(tmp_path, capsys):
    teacher = GroupingNetwork("tiny", K, 12, 6).train()
    c = SimpleNamespace(held_out=9, arch="tiny", num_prototypes=K, dim_hidden=12, dim_out=6, seed=4)
    report = results.toy_result(ended(teacher, tmp_path), c)
    assert report["seconds"] == 1000
    assert json.loads((tmp_path / "result.json").read_text()) == report
    scenes, untrained = toy.ToyImages(UNSEEN, 9), untrained_network("tiny", K, 12, 6, seed=4)
    labeled = scenes.images, scenes.semantic, toy.CLASS_NAMES
    expected = compare_in_memory(teacher, untrained, *labeled)
    assert report == {**expected, "seconds": report["seconds"]}
    assert Image.open(tmp_path / "groups.png").width > 1100  # eight scenes in a row
    text = capsys.readouterr().out
    for words in ("9 scenes never trained on", "k-means on RGB", f"groups.png in {tmp_path}"):
        assert words in text


def test_a_run_on_photographs_shows_those_kept_out_and_names_what_cannot_be_read(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (40 + i, 50), (90 * i, 50, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.jpg").write_text("no image")
    images = ImageFiles(tmp_path, ["0.png", "bad.jpg", "1.png", "2.png"])
    teacher = GroupingNetwork("tiny", K, 12, 6)
    run, c = (ended(teacher, tmp_path), SimpleNamespace(temp_teacher=0.07, image_size=48))
    report = results.photos_result(run, c, images)
    assert report["images"] == 3 and report == json.loads((tmp_path / "result.json").read_text())
    for name in ("groups", "prototypes"):
        assert Image.open(tmp_path / f"{name}.png").width > 300
    out, err = capsys.readouterr()
    assert "3 photographs kept out" in out and "slots are occupied" in out and "bad.jpg" in err
    assert "photographs of 224 px; the log counts in crops of 48 px" in out
    nothing = ImageFiles(tmp_path, ["bad.jpg"])
    assert results.photos_result(run, c, nothing) == {}
    assert "no photograph that was kept out can be read" in capsys.readouterr().out
