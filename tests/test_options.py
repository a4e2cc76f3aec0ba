"""engine/options.py: command lines from dataclasses and subcommands, and one line for mistakes."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from engine import options
from engine.options import option


@dataclasses.dataclass(frozen=True)
class Dials:
    preset: str = option("plain", "named recipe", free=True)
    steps: int = option(10, "how many, 50 % more on Sundays", "machine", low=1, high=100)
    big_rate: float = option(0.5, "share", low=0, high=1)
    kind: str = option("round", "shape", "method", choices=("round", "square"))
    loud: bool = option(False, "print everything")
    both: tuple[float, float] = option((1.0, 0.1), "one per view", "views", low=0)
    folder: str = option("", "anything", "files", free=True)


PRESETS = {"plain": Dials(), "fast": Dials(preset="fast", steps=3, big_rate=0.25)}
DOC = "A program.\n\n    python program.py\n\nSlide: the first.\nPaper: 3.\nRead next: other.py."


def parse(*argv):
    parser = options.Parser(description=DOC)
    options.add_options(parser, PRESETS)
    return options.settle(PRESETS, parser.parse_args(argv))


def test_every_type_of_field_is_read_and_the_given_names_are_returned(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = "--steps 7 --big-rate 1e-1 --kind square --loud --both 0.3 1 --folder ~/a".split()
    found, given = parse(*words)
    assert found == Dials("plain", 7, 0.1, "square", True, (0.3, 1.0), "/home/me/a")
    assert given == {"steps", "big_rate", "kind", "loud", "both", "folder"}
    assert parse() == (Dials(), set()) and parse("--no-loud") == (Dials(), {"loud"})
    expected = (Dials(preset="fast", steps=5, big_rate=0.25), {"preset", "steps"})
    assert parse("--steps", "5", "--preset", "fast") == expected


def test_the_help_has_groups_and_defaults_and_ends_its_description_before_the_slide(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "A program.\n\n    python program.py\n\n" in text
    assert not any(word in text for word in ("Slide", "Paper", "Read next", "optimizer"))
    text = " ".join(text.split())
    expected = (
        "usual: --preset NAME named recipe; one of plain, fast (default: plain) --big-rate X",
        "method: --kind NAME shape; one of round, square (default: round)",
        "views: --both X X one per view (default: 1.0 0.1)",
        "machine: --steps N how many, 50 % more on Sundays (default: 10; fast 3)",
        "files: --folder NAME anything",
    )
    places = [text.index(line) for line in expected]
    assert places == sorted(places)


def test_differences_name_what_changed_and_pass_over_free_options():
    earlier = dataclasses.asdict(Dials(steps=5, folder="other")) | {"both": [1.0, 0.1]}  # JSON
    assert options.differences(Dials(), earlier) == ["steps: 5 then, 10 now"]
    del earlier["kind"]  # what was unknown then had its default
    assert options.differences(Dials(steps=5), earlier | {"loud": 1}) == ["loud: 1 then, False now"]


def draw(args) -> dict:
    print("a table")
    return dict(device=str(args.device), files=[str(file) for file in args.files])


@pytest.fixture
def commands():
    known = options.Commands("draw.py", DOC)
    known.add("erase", "remove something")
    parser = known.add("draw", "draw something")
    options.add_checkpoint(parser)
    options.add_images(parser, "folder of images")
    options.add_output(parser, "draw.png")
    parser.add_argument("--size", type=options.side)
    parser.add_argument("files", nargs="*", default=[], type=options.path)
    return known


REFUSED = [  # by the parser of the dataclass, or by that of the subcommands
    ("--steps 0", "--steps 0 is out of range: expected 1 to 100"),
    ("--steps 1.5", "argument --steps: invalid int value: '1.5'"),
    ("--big-rate nan", "--big-rate nan is out of range: expected 0 to 1"),
    ("--both 0.5 nan", "--both nan is out of range: expected at least 0"),
    ("--kind oval", "argument --kind: invalid choice: 'oval' (choose from "),
    ("--rate 3", "unrecognized argument --rate: did you mean --big-rate?"),
    ("--step 3", "unrecognized argument --step: did you mean --steps?"),
    ("--big_rate=1", "unrecognized argument --big_rate=1: did you mean --big-rate?"),
    ("--xyz 3 b", "unrecognized argument --xyz"),
    ("drwa", "argument erase | draw: invalid choice: 'drwa' (choose from "),
    ("", "the following arguments are required: erase | draw"),
    ("draw", "the following arguments are required: checkpoint"),
    ("draw c.pth --siz", "unrecognized argument --siz: did you mean --size?"),
    ("erase a b", "unrecognized argument a"),
    ("draw c.pth --sized 9 a", "unrecognized argument --sized: did you mean --size?"),
    ("draw c.pth --limit -1", "argument --limit: -1: expected a whole number, at least 0"),
    ("draw c.pth --size 31", "argument --size: 31: expected a whole number, at least 32"),
]


@pytest.mark.parametrize("argv, complaint", REFUSED)
def test_a_wrong_command_line_is_refused_with_one_line(commands, argv, complaint):
    words = argv.split()
    with pytest.raises(ValueError) as caught:
        parse(*words) if argv.startswith("--") else commands.parse_args(words)
    assert str(caught.value).startswith(complaint) and "\n" not in str(caught.value)
    assert ("did you mean" in str(caught.value)) == ("did you mean" in complaint)


def test_json_is_written_only_where_it_is_asked_for(commands, tmp_path, capsys):
    file, words = tmp_path / "new" / "r.json", "draw last.pth --device cpu a b".split()
    run = lambda *more: commands.run([*words, *more], dict(draw=draw))
    assert run() == 0 and capsys.readouterr() == ("a table\n", "")
    assert run("--json", str(file)) == 0 and capsys.readouterr() == ("a table\n", "")
    assert json.loads(file.read_text()) == dict(command="draw", device="cpu", files=["a", "b"])
    run("--json", "-")
    assert capsys.readouterr() == (file.read_text(), "a table\n")
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="give another place by --json"):
            run("--json", str(place))
    assert capsys.readouterr().out == ""


def test_options_may_split_a_list_and_a_folder_is_its_checkpoint(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = commands.parse_args("draw ~ ~/a.png --limit 9 b --data-dir ~/c d".split())
    assert (args.checkpoint, args.data_dir) == (tmp_path / "last.pth", tmp_path / "c")
    assert args.files == [tmp_path / "a.png", Path("b"), Path("d")] and args.limit == 9


def test_where_a_figure_goes(tmp_path):
    default = tmp_path / "run" / "slots.png"
    assert options.output_file(None, default) == default and default.parent.is_dir()
    assert options.output_file(tmp_path, default) == tmp_path / "slots.png"
    assert options.output_file(tmp_path / "new" / "a.PDF", default) == tmp_path / "new" / "a.PDF"
    (tmp_path / "file").touch()
    for name in ("a.doc", "file/a.png"):
        with pytest.raises(ValueError, match=name):
            options.output_file(tmp_path / name, default)
