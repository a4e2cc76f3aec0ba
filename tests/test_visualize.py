"""visualize.py: the commands, where their figures go, and refusals."""

import json
from pathlib import Path

import pytest
from PIL import Image

import visualize
from trained import record, save_checkpoint, write_run


@pytest.fixture
def places(tmp_path):
    """What is visualized, under the words that stand for it."""
    (tmp_path / "photos").mkdir()
    Image.radial_gradient("L").save(tmp_path / "photos" / "cat.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    run = write_run(tmp_path / "run", [json.dumps(record(s)) for s in (10, 20)])
    return dict(
        TRAINED=str(save_checkpoint(run / "last.pth")),
        BACKBONE=str(run / "backbone.pth"),
        PHOTOS=str(tmp_path / "photos"),
        CAT=str(tmp_path / "photos" / "cat.png"),
        RUN=str(run),
        RUNS=str(write_run(tmp_path / "b_$5_$6", [json.dumps(record(10))], seed=1)),
        EMPTY=str(write_run(tmp_path / "empty", ["{}"])),
        OUT=str(tmp_path / "out.png"),
    )


@pytest.mark.parametrize("command, name", [
    ("prototypes TRAINED --limit 4 --top 2 --count 3 --size 32", "prototypes_toy_scenes"),
    ("prototypes RUN --data-dir PHOTOS --size 32", "prototypes_photos"),
    ("groups TRAINED CAT --size 32", "groups_cat"),
    ("groups TRAINED --slots 9 CAT CAT --size 32", "groups_cat_and_1_more"),  # words at the end
    ("groups TRAINED PHOTOS --size 32", "groups_photos"),
    ("groups RUN --count 1 --output PHOTOS", "../photos/groups_toy_scenes"),
    ("training RUN", "training"),
    ("training RUN RUNS", "training_with_b_$5_$6"),
])  # fmt: skip
def test_figures_are_beside_what_they_show(command, name, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "photos")
    assert visualize.main([places.get(w, w) for w in command.split()] + ["--json", "-"]) == 0
    file = Path(json.loads(capsys.readouterr().out)["file"]).resolve()
    assert file == Path(places["RUN"], f"{name}.png").resolve() and Image.open(file).width > 300


@pytest.mark.parametrize("command, message", [
    ("prototypes none.pth", "none.pth"),
    ("prototypes TRAINED --show best --limit 2", "numbers from 0 to 4"),
    ("groups TRAINED nowhere.jpg", "cannot read nowhere.jpg: no such file"),
    ("groups TRAINED CAT --output CAT", "is one of the images"),
    ("groups BACKBONE", "is a backbone only (tiny)"),
    ("training nowhere", "give the output directory"),
    ("training EMPTY", "no line with a step yet"),
])  # fmt: skip
def test_wrong_input_ends_with_one_line_and_status_2(command, message, places, capsys):
    words = [places.get(word, word) for word in command.split()]
    output = [] if "--output" in words else ["--output", places["OUT"]]
    assert visualize.main([*words, *output]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("visualize.py: ") and err.count("\n") == 1 and not out
    assert not Path(places["OUT"]).exists()
