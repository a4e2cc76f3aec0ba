"""What the texts promise is there: links, files, functions, commands, the slides' tables."""

import argparse
import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import recipes

ROOT = Path(__file__).resolve().parent.parent
TEXTS = sorted(
    str(file.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "notebooks/*.md")
    for file in ROOT.glob(pattern)
)
PROGRAMS = ("train", "evaluate", "visualize", "compare", "transfer", "export")


def text_of(name):
    return (ROOT / name).read_text()


def anchors_of(text):
    """The anchors that a page of Markdown has, as GitHub makes them from its headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(name, text):
    """Links of a text to files or headings that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or (anchor and anchor not in anchors_of(file.read_text())):
            broken.append(target)
    return broken


def names_defined(file):
    tree = ast.parse(file.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def missing_names(text):
    """Of `file.py` and `file.py: name`, and of the names in a row of the map, what is not there."""
    missing = []
    for file, name in re.findall(
        r"`([\w/]+\.py)(?:: (\w+))?`", text.replace("NAME.py", "losses.py")
    ):
        where = next((ROOT / top / file for top in ("", "benchmarks", "notebooks")
                      if (ROOT / top / file).is_file()), None)  # fmt: skip
        if where is None or (name and name not in names_defined(where)):
            missing.append(f"{file}: {name}" if name else file)
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        cells = row.strip("|").split("|")
        files = re.findall(r"`([\w/]+\.py)`", cells[1]) if len(cells) == 4 else []
        known = {name for file in files for name in names_defined(ROOT / file)}
        if files:
            found = re.findall(r"`(\w+)`", cells[2])
            missing += [f"{files[0]}: {name}" for name in found if name not in known]
    return missing


def commands_of(text):
    """(program, arguments) of each command line that a text prints, in blocks and within lines."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for line in lines:
        if "..." in line:  # a part of a command, which the text completes
            continue
        match = re.search(r"(?:^|\s)(?:python3?|torchrun)\s(?:--\S+\s+)*(\w+)\.py\b(.*)", line)
        if match and match[1] in PROGRAMS:
            arguments = re.split(r"\s#|\s&|[;|]|&&", match[2])[0]
            found.append((match[1], arguments.strip()))
    return found


COMMANDS = [(name, *command) for name in TEXTS for command in commands_of(text_of(name))]


class Understood(BaseException):
    """The command line was taken; what it would do is another test's business."""


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    assert not broken_links(name, text_of(name))


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_and_function_that_is_named_is_there(name):
    assert not missing_names(text_of(name))


def test_the_map_names_the_notebook_and_the_test_of_every_concept():
    numbers = {file.name[:2] for file in (ROOT / "notebooks").glob("*.ipynb")}
    rows = [
        row.strip("|").split("|")
        for row in re.findall(r"^\|.*\|$", text_of("README.md"), re.MULTILINE)
    ]
    rows = [cells for cells in rows if len(cells) == 4 and ".py`" in cells[1]]
    assert len(rows) > 10
    for cells in rows:
        assert set(re.findall(r"\d\d", cells[3])) <= numbers and cells[3].strip(), cells
    files = re.findall(r"`(\w+)\.py`", " ".join(cells[1] for cells in rows))
    tested = {"recipes": "options", "photometric": "photometric"}
    for file in files:
        assert (ROOT / "tests" / f"test_{tested.get(file, file)}.py").is_file(), file


@pytest.mark.parametrize("text, program, arguments", COMMANDS)
def test_every_command_is_understood_by_its_program(text, program, arguments, monkeypatch, capsys):
    """COCO, PHOTOS and the like need not be there: the command line alone is read."""
    parse, inside = argparse.ArgumentParser.parse_known_args, []

    def parse_only(self, *given, **named):
        inside.append(self)  # a subcommand is parsed within its program
        options, unknown = parse(self, *given, **named)
        inside.pop()
        if inside:
            return options, unknown
        assert not [word for word in unknown if word.startswith("-")], unknown
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    argv = shlex.split(arguments.replace("--seed S", "--seed 0"))
    expected = SystemExit if "--help" in argv else Understood
    with pytest.raises(expected):
        importlib.import_module(program).main(argv)


def test_the_commands_are_found():
    """Or the test above would be about nothing."""
    found = [command for name, *command in COMMANDS if name == "README.md"]
    assert len(found) > 20 and {program for program, _ in found} == set(PROGRAMS)
    assert ["train", "--preset photos --data-dir PHOTOS"] in found


def test_a_broken_text_is_reported():
    assert broken_links("README.md", "[a](docs/nothing.md), [b](docs/data.md#nowhere)") == [
        "docs/nothing.md", "docs/data.md#nowhere",
    ]  # fmt: skip
    assert missing_names("`losses.py: no_loss`, `nothing.py`") == [
        "losses.py: no_loss",
        "nothing.py",
    ]
    assert missing_names("| slide | `losses.py` | `center_of` | 04 |") == ["losses.py: center_of"]


def test_the_tables_hold_the_numbers_of_the_slides_and_the_commands_of_the_recipes():
    text, slides = text_of("docs/tables.md"), json.loads(text_of("notebooks/slides.json"))
    rows = [re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    for name, table in slides.items():
        if name == "statistics":
            continue
        for label, values in table["rows"].items():
            expected = ["" if value is None else str(value) for value in values]
            if name == "8e" and label == "random init.":  # of table 2
                continue
            found = [row for row in rows if row[0].strip("*") == label]
            assert any(row[1 : 1 + len(expected)] == expected for row in found), (name, label)
    for name, (_, ablation) in recipes.TABLES.items():
        for row in ablation:
            line = [cells for cells in rows if cells[0].strip("*") == row.label
                    and cells[-1] == f"`{recipes.command(row)}`"]  # fmt: skip
            assert line, (name, row.label)
            assert (line[0][0] != row.label) == (row.default and name != "collapse")
