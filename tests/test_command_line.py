"""engine/command_line.py: one command line for all programs."""

import argparse
import json
from pathlib import Path

import pytest
from trained import save_checkpoint

from engine import command_line
from engine.command_line import Commands, add_checkpoint, add_images, add_output, output_file
from engine.program import path, run_program


@pytest.fixture
def commands():
    """A program with one subcommand, which prints a line and returns its options."""
    known = Commands("draw.py", "Draw.")

    def draw(args: argparse.Namespace) -> dict:
        print("a table")
        return dict(checkpoint=str(args.checkpoint), network=args.network, limit=args.limit,
                    files=[str(file) for file in args.files])

    parser = known.add("draw", draw, "draw something", paths="files")
    add_checkpoint(parser)
    add_images(parser, "folder of images")
    add_output(parser, "draw.png")
    parser.add_argument("files", nargs="*", type=path)
    return known


@pytest.fixture
def trained(tmp_path):
    return str(save_checkpoint(tmp_path / "last.pth"))


def test_json_is_written_only_where_it_is_asked_for(commands, trained, tmp_path, capsys):
    assert commands.run(["draw", trained]) == 0
    assert capsys.readouterr().out == "a table\n"
    assert commands.run(["draw", trained, "--json", str(tmp_path / "new" / "r.json")]) == 0
    assert capsys.readouterr().out == "a table\n"
    written = json.loads((tmp_path / "new" / "r.json").read_text())
    assert commands.run(["draw", trained, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == written and err == "a table\n"
    assert written["command"] == "draw" and written["checkpoint"] == trained


def test_a_folder_stands_for_the_last_checkpoint_in_it(commands, trained, tmp_path):
    assert commands.parse(["draw", str(tmp_path)]).checkpoint == Path(trained)


def test_a_folder_without_it_names_what_is_there(commands, trained, tmp_path):
    Path(trained).unlink()
    with pytest.raises(ValueError, match=r"no last\.pth in the folder .*found backbone\.pth"):
        commands.parse(["draw", str(tmp_path)])


def test_the_home_folder_may_be_written_as_a_tilde(commands, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = commands.parse(["draw", "~/last.pth", "~/a.png", "--data-dir", "~/photos",
                           "--output", "~/o.png", "--json", "~/r.json", "~/b.png"])
    found = [args.checkpoint, args.data_dir, args.output, args.json, *args.files]
    names = ("last.pth", "photos", "o.png", "r.json", "a.png", "b.png")
    assert found == [tmp_path / name for name in names]


def test_the_old_name_of_the_option_network_still_works_and_is_not_advertised(
    commands, trained, capsys
):
    for words, network in (([], "teacher"), (["--network", "student"], "student"),
                           (["--which", "student"], "student")):
        assert commands.parse(["draw", trained, *words]).network == network
    with pytest.raises(SystemExit):
        commands.parse(["draw", "--help"])
    assert "--which" not in capsys.readouterr().out


def test_many_unexpected_words_are_counted_and_not_repeated(trained):
    known = Commands("draw.py", "Draw.")
    add_checkpoint(known.add("draw", dict, "draw something"))
    with pytest.raises(ValueError, match=r"^unrecognized arguments: 0\.jpg and 365 more$"):
        known.parse(["draw", trained, *[f"{i}.jpg" for i in range(366)]])
    with pytest.raises(ValueError, match=r"^unrecognized arguments: --sized$"):
        known.parse(["draw", trained, "--sized"])


def test_an_unknown_option_among_paths_is_not_taken_for_a_path(commands, trained):
    with pytest.raises(ValueError, match="unrecognized arguments: --sized and 1 more"):
        commands.parse(["draw", trained, "--limit", "2", "--sized", "a.png"])


def test_where_a_figure_goes(tmp_path):
    default = tmp_path / "run" / "slots.png"
    assert output_file(None, default) == default and default.parent.is_dir()
    assert output_file(tmp_path, default) == tmp_path / "slots.png"
    assert output_file(tmp_path / "new" / "a.pdf", default) == tmp_path / "new" / "a.pdf"
    with pytest.raises(ValueError, match="a name that ends in one of"):
        output_file(tmp_path / "a.doc", default)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot make the folder of"):
        output_file(tmp_path / "file" / "a.png", default)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(commands, trained, tmp_path,
                                                                    capsys):
    with pytest.raises(ValueError, match="give another place by --json"):
        commands.run(["draw", trained, "--json", str(tmp_path)])
    assert "a table" not in capsys.readouterr().out


def test_interrupting_ends_with_one_line_and_status_130(trained, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    known = Commands("draw.py", "Draw.")
    add_checkpoint(known.add("draw", interrupted, "draw something"))
    assert run_program("draw.py", known.run, ["draw", trained]) == 130
    assert capsys.readouterr().err == "draw.py: interrupted\n"


def test_the_formats_of_figures_are_known_to_matplotlib():
    from matplotlib.figure import Figure

    supported = Figure().canvas.get_supported_filetypes()
    assert {suffix.removeprefix(".") for suffix in command_line.FIGURES} <= set(supported)
