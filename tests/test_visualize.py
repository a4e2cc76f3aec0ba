"""visualize.py: the commands, where their figures go, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trained import record, save_checkpoint, write_run

import visualize


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "run").mkdir()
    return str(save_checkpoint(tmp_path / "run" / "last.pth"))


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "cat.png")
    return str(tmp_path / "photos" / "cat.png")


def files_of(*argv, capsys):
    """The files that a command says it has written."""
    assert visualize.main([*argv, "--json", "-"]) == 0
    files = [Path(file) for file in json.loads(capsys.readouterr().out)["files"]]
    assert all(Image.open(file).width > 300 for file in files)
    return files


def test_every_subcommand_writes_the_figure_that_is_asked_for(trained, photo, tmp_path, capsys):
    file = tmp_path / "out.png"
    for command in (["prototypes", trained, "--limit", "6", "--top", "2", "--count", "3"],
                    ["groups", trained, "--count", "2", "--slots", "9"],
                    ["groups", trained, photo],
                    ["groups", trained, "--data-dir", str(tmp_path / "photos"), "--count", "1"]):
        assert files_of(*command, "--output", str(file), capsys=capsys) == [file]
        file.unlink()


def test_figures_stand_beside_the_checkpoint_and_are_named_after_what_they_show(
    trained, photo, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    run = tmp_path / "run"
    photos = str(tmp_path / "photos")
    write_run(run, [json.dumps(record(10))])
    for command, name in ((["prototypes", trained, "--limit", "2", "--top", "1"], "prototypes"),
                          (["groups", trained, photo], "groups_cat"),
                          (["groups", trained, photo, photo], "groups_cat_and_1_more"),
                          (["groups", trained, "--data-dir", photos], "groups_photos"),
                          (["groups", trained, "--count", "1"], "groups_toy_scenes"),
                          (["training", str(run)], "training")):
        assert files_of(*command, capsys=capsys) == [run / f"{name}.png"]
    assert set(tmp_path.iterdir()) == before  # nothing falls into the working directory


def test_a_folder_as_output_takes_the_usual_name(trained, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    command = ["groups", trained, "--count", "1", "--output", str(tmp_path / "there")]
    assert files_of(*command, capsys=capsys) == [tmp_path / "there" / "groups_toy_scenes.png"]


def test_images_may_stand_after_options(trained, photo, capsys):
    command = ["groups", trained, "--slots", "2", photo, photo]
    assert files_of(*command, capsys=capsys)[0].name == "groups_cat_and_1_more.png"


def test_many_images_go_to_several_files(trained, photo, capsys):
    files = files_of("groups", trained, *[photo] * 13, "--size", "32", "--slots", "1",
                     capsys=capsys)
    assert [file.name for file in files] == [
        "groups_cat_and_12_more-001.png", "groups_cat_and_12_more-002.png"]


def test_runs_are_compared_in_one_figure(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, [json.dumps(record(s)) for s in (10, 20)], seed=i))
            for i, name in enumerate(("a", "b", "c"))]
    compared, = files_of("training", *runs, capsys=capsys)
    assert compared == tmp_path / "a" / "training_with_b_c.png"
    single, = files_of("training", runs[0], capsys=capsys)
    heights = [Image.open(file).height for file in (compared, single)]
    assert heights[0] > heights[1]  # the legend of the runs


def test_a_log_without_a_configuration_is_drawn_and_the_output_names_what_is_missing(
    tmp_path, capsys
):
    run = write_run(tmp_path / "run", [json.dumps(record(s)) for s in (10, 20)])
    assert visualize.main(["training", str(run), "--output", str(tmp_path / "a.png")]) == 0
    assert "no config.json" in capsys.readouterr().out and (tmp_path / "a.png").is_file()


@pytest.mark.parametrize("argv, message", [
    (["prototypes", "none.pth"], "no checkpoint"),
    (["prototypes", "TRAINED", "--show", "best", "--limit", "2"], "numbers from 0 to 4"),
    (["groups", "TRAINED", "nowhere.jpg"], "cannot read"),
    (["groups", "nowhere.jpg", "another.jpg"], "is an image where the checkpoint"),
    (["groups", "TRAINED", "--count", "0"], "less than 1"),
    (["groups", "TRAINED", "--size", "8"], "argument --size: 8 px are too few: it takes at least"),
    (["prototypes", "TRAINED", "--size", "31"], "argument --size: 31 px are too few"),
    (["groups", "TRAINED", "--size", "big"], "argument --size: invalid side value: 'big'"),
    (["groups", "BACKBONE"], "backbone only (tiny)"),
    (["training", "nowhere"], "give the output directory of a run"),
    (["training", "EMPTY"], "no line with a step yet"),
    (["training", "LISTED"], "config.json holds no options of a run"),
    (["paint"], "invalid choice"),
])  # fmt: skip
def test_wrong_input_ends_with_one_line_and_exit_code_2(argv, message, trained, tmp_path, capsys):
    places = dict(TRAINED=trained, EMPTY=str(write_run(tmp_path / "empty", ["{}"])),
                  BACKBONE=str(tmp_path / "run" / "backbone.pth"))
    places["LISTED"] = str(write_run(tmp_path / "listed", [json.dumps(record(10))]))
    (tmp_path / "listed" / "config.json").write_text('["toy"]')
    words = [places.get(word, word) for word in argv]
    output = ["--output", str(tmp_path / "out.png")] if argv != ["paint"] else []
    assert visualize.main([*words, *output]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("visualize.py: ") and err.count("\n") == 1 and not out
    assert not (tmp_path / "out.png").exists()
