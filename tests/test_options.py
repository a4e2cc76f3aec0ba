"""options.py: a frozen dataclass is a command line.

Promised: one option per field, of the field's type; a preset that only the given options change;
one clear line for everything that is not a number, not in range, not a choice or not an option at
all.
"""

import dataclasses

import pytest

from engine import options
from engine.options import option


@dataclasses.dataclass(frozen=True)
class Dials:
    preset: str = option("plain", "named recipe", free=True)
    steps: int = option(10, "how many, 50 % more on Sundays", low=1, high=100)
    big_rate: float = option(0.5, "share", low=0, high=1)
    kind: str = option("round", "shape", choices=("round", "square"))
    loud: bool = option(False, "say everything")
    format: bool | None = option(None, "or whatever fits", free=True)
    both: tuple[float, float] = option((1.0, 0.1), "one per view", low=0, high=1)
    name: str = option("", "anything", free=True)


PRESETS = {"plain": Dials(), "fast": Dials(preset="fast", steps=3, big_rate=0.25)}


def parse(*argv):
    return options.parse(PRESETS, list(argv), "A program.")


def test_without_arguments_the_first_preset_comes_as_it_is():
    assert parse() == (Dials(), set())


def test_every_type_of_field_is_read_from_the_command_line():
    found, given = parse(
        "--steps",
        "7",
        "--big-rate",
        "1e-1",
        "--kind",
        "square",
        "--loud",
        "--no-format",
        "--both",
        "0.3",
        "1",
        "--name",
        "a b",
    )
    assert found == Dials(
        steps=7, big_rate=0.1, kind="square", loud=True, format=False, both=(0.3, 1.0), name="a b"
    )
    assert given == {"steps", "big_rate", "kind", "loud", "format", "both", "name"}
    assert isinstance(found.both, tuple)


def test_options_replace_what_the_preset_says_wherever_they_stand():
    expected = Dials(preset="fast", steps=5, big_rate=0.25)
    assert parse("--preset", "fast", "--steps", "5") == parse("--steps", "5", "--preset", "fast")
    assert parse("--preset", "fast", "--steps", "5") == (expected, {"preset", "steps"})


def test_a_given_option_counts_as_given_also_where_it_equals_the_preset():
    assert parse("--steps", "10") == (Dials(), {"steps"})


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--steps", "0"], "--steps 0 is out of range: expected 1 to 100"),
        (["--steps", "-3"], "--steps -3 is out of range: expected 1 to 100"),
        (["--steps", "101"], "--steps 101 is out of range: expected 1 to 100"),
        (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--big-rate", "nan"], "--big-rate nan is out of range: expected 0 to 1"),
        (["--big-rate", "inf"], "--big-rate inf is out of range: expected 0 to 1"),
        (["--big-rate", "much"], "argument --big-rate: invalid float value: 'much'"),
        (["--both", "0.5", "nan"], "--both nan is out of range: expected 0 to 1"),
        (["--both", "0.5"], "argument --both: expected 2 arguments"),
        (["--kind", "oval"], "argument --kind: invalid choice: 'oval' (choose from "),
        (["--preset", "slow"], "argument --preset: invalid choice: 'slow' (choose from "),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (
            ["--step", "3"],
            "unrecognized arguments: --step 3",
        ),  # no abbreviations: a typo must not become an option
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(argv, complaint):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)


def test_the_help_says_each_option_its_default_and_a_percent_sign(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for f in dataclasses.fields(Dials):
        assert options.flag(f.name) in text
    assert "how many, 50 % more on Sundays (default: 10" in text


def test_ranges_and_choices_hold_also_for_what_no_command_line_wrote():
    options.check_ranges(Dials())
    with pytest.raises(ValueError, match="--kind oval: choose one of round, square"):
        options.check_ranges(Dials(kind="oval"))
    with pytest.raises(ValueError, match="--both 2 is out of range"):
        options.check_ranges(Dials(both=(0.5, 2)))


def test_differences_name_what_changed_and_pass_over_free_options():
    earlier = dataclasses.asdict(Dials(steps=5, name="other", format=True)) | {
        "both": [1.0, 0.1]
    }  # as JSON has it
    assert options.differences(Dials(), earlier) == ["steps: 5 then, 10 now"]
    assert options.differences(Dials(), dataclasses.asdict(Dials())) == []
    del earlier["kind"]
    # What earlier settings did not know yet counts as its default.
    assert options.differences(Dials(), earlier) == ["steps: 5 then, 10 now"]


def test_tuples_compare_as_lists_and_names_become_flags():
    assert options.as_list((1, 2)) == [1, 2] and options.as_list("ab") == "ab"
    assert options.flag("big_rate") == "--big-rate"


@dataclasses.dataclass(frozen=True)
class Kinds:
    kind: str = option("a", "which", choices=("a", "b"))
    size: tuple[int, int] = option((3, 4), "px", low=1)
    labeled: int = option(0, "how many", also=("--labelled",))


def test_another_field_may_name_the_preset_and_an_option_have_two_spellings():
    kinds = {"a": Kinds(), "b": Kinds(kind="b", labeled=7)}
    parser = options.Parser()
    options.add_options(parser, kinds, by="kind")
    settle = lambda *argv: options.settle(kinds, parser.parse_args(list(argv)), by="kind")
    assert settle() == (Kinds(), set())
    assert settle("--kind", "b", "--size", "5", "6") == (
        Kinds(kind="b", size=(5, 6), labeled=7),
        {"kind", "size"},
    )
    assert settle("--labelled", "2") == settle("--labeled", "2") == (Kinds(labeled=2), {"labeled"})
    with pytest.raises(ValueError, match="invalid int value"):
        settle("--size", "5", "6.5")
