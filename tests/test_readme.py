"""What the texts say is there: links, files, names, commands, the numbers of the slides."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import compare
import evaluate
import export
import recipes
import visualize
from downstream import settings

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "docs/", "benchmarks/", "notebooks/")
FILES = [file for folder in FOLDERS for file in ROOT.glob(f"{folder}*.md")]
TEXTS = {str(file.relative_to(ROOT)): file.read_text() for file in FILES}
PARSE = {
    "train": recipes.parse,
    "evaluate": evaluate.commands().parse_args,
    "visualize": visualize.commands().parse_args,
    "compare": compare.parse,
    "transfer": lambda argv: settings.parse(argv, ""),
    "export": export.parse,
}


def rows_of(text):
    """The rows of all tables, each a list of its cells."""
    return [re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\|.*\|$", text, re.M)]


def broken_links(name, text):
    """Links of a text to files or headings that are not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if "://" in target or (file.exists() and (not anchor or anchor in anchors_of(file))):
            continue
        broken.append(target)
    return broken


def anchors_of(page):
    """The anchors of a page, as GitHub makes them from its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_there(files, name):
    """Whether one of these files defines a function, class or variable; "": whether it exists."""
    found = [ROOT / folder / file for file in files for folder in FOLDERS]
    found = [file.read_text() for file in found if file.is_file()]
    nodes = [node for source in found for node in ast.walk(ast.parse(source))]
    stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return bool(found) and name in {"", *stored, *(getattr(node, "name", "") for node in nodes)}


def missing_names(text):
    """What is not there, of `file.py`, of `file.py: name`, and of the names in a row of the map."""
    claims = [([file], name) for file, name in re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", text)]
    for _, where, what, _ in (cells for cells in rows_of(text) if len(cells) == 4):
        files = re.findall(r"`([\w/]+\.py)`", where)
        claims += [(files, name) for name in re.findall(r"`(\w+)`", what) if files]
    return [f"{files[0]}: {name}" for files, name in claims if not is_there(files, name)]


def commands_of(text):
    """(program, arguments) of each command that a text prints, in blocks and within lines."""
    text = text.replace("\\\n", " ")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    start = r"(?:^|\s)(?:python3?|torchrun)\s+(?:--\S+\s+)*([\w/]+)\.py\b(.*)"
    found = [match for line in lines if "..." not in line and (match := re.search(start, line))]
    return [(match[1], re.split(r"\s#|\s&|[;|]", match[2])[0].strip()) for match in found]


COMMANDS = [(name, *command) for name in TEXTS for command in commands_of(TEXTS[name])]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere_and_names_are_there(name):
    assert broken_links(name, TEXTS[name]) + missing_names(TEXTS[name]) == []


@pytest.mark.parametrize("text, program, arguments", COMMANDS)
def test_every_command_is_understood_by_its_program(text, program, arguments):
    """COCO, PHOTOS and the like need not be there: the command line alone is read."""
    if program in PARSE and "--help" not in arguments:
        PARSE[program](shlex.split(arguments.replace("--seed S", "--seed 0")))
    elif program not in PARSE:  # a script, such as benchmarks/law.py; behind `--` another's options
        own = re.findall(r"--[a-z][\w-]*", re.split(r"(?:^|\s)--\s", arguments)[0])
        script = (ROOT / f"{program}.py").read_text()
        assert [each for each in own if not re.search(rf"{each}(?![\w-])", script)] == []


def test_every_program_has_a_command_in_the_texts():
    assert {program for _, program, _ in COMMANDS} > set(PARSE)
    assert ("README.md", "train", "--preset photos --data-dir PHOTOS") in COMMANDS


def test_the_tables_have_the_numbers_of_the_slides_and_the_options_of_the_recipes():
    lines, head = {}, []
    for cells in rows_of(TEXTS["docs/tables.md"]):
        head = cells if cells[0] == "table" else head
        lines[cells[0], cells[1].strip("*")] = dict(zip(head, cells))
    slides = json.loads((ROOT / "notebooks" / "slides.json").read_text())
    for table, content in slides.items():
        for label, values in content["rows"].items() if table != "statistics" else ():
            line = lines["2" if (table, label) == ("8e", "random init.") else table, label]
            expected = {k: str(v or "") for k, v in zip(content["columns"], values)}
            assert {column: line[column] for column in expected} == expected, (table, label)
    for table, (_, rows) in recipes.TABLES.items():
        for row in rows:
            line, words = lines[table, row.label], " ".join(row.options)
            assert line["options"] == f"`{words or f'python compare.py --table {table}'}`"
            assert row.default == line["row"].startswith("**")
