"""The laws of the house (CONTRIBUTING.md) that ruff does not know: arrows, sizes, words."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RETIRED = "(?i)(?<!tree )trunk|journal|keeper|verdict|colour|grey"
PROGRAMS = "train|evaluate|visualize|compare|transfer|export"
NOUNS = "backbone|grouping|slots|losses|teacher|slotcon|data|photometric|toy"
WRONG_ARROW = re.compile(
    rf"(?!tests|benchmarks|notebooks)\S+ imports ({PROGRAMS})"
    r"|engine\S* imports (?!engine)\S+"
    r"|(measures|comparisons|downstream)\S* imports recipes"
    r"|(?!data imports engine.images|backbone imports engine.timm_networks)"
    rf"({NOUNS}) imports (?!{NOUNS}|engine.ranks)\S+"
)


def read(*patterns: str) -> dict[str, str]:
    """Module -> source: engine/batches.py -> engine.batches, engine/__init__.py -> engine."""
    files = [file.relative_to(ROOT) for pattern in patterns for file in ROOT.glob(pattern)]
    names = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in files]
    return {name: (ROOT / file).read_text() for name, file in zip(names, files)}


TOP = read("*.py")
ALL = TOP | read("[a-z]*/*.py")
nodes_of = cache(lambda source: tuple(ast.walk(ast.parse(source))))


def imports(nodes, known) -> list[tuple[str, str, str]]:
    """Imports of known modules: (module, name taken of it or "", the name that it has here)."""
    found = []
    for node in nodes:
        module = node.module if isinstance(node, ast.ImportFrom) else ""
        for each in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            here, whole = each.asname or each.name, f"{module}.{each.name}".strip(".")
            found.append((whole, "", here) if whole in known else (module, each.name, here))
    return [each for each in found if each[0] in known]


def wrong_arrows(sources: dict[str, str]) -> list[str]:
    found = []
    for name, source in sources.items():
        found += [f"{name} imports {way[0]}" for way in imports(nodes_of(source), sources)]
    return [line for line in found if WRONG_ARROW.fullmatch(line)]


def circles(sources: dict[str, str]) -> list[str]:
    bodies = {name: nodes_of(source)[0].body for name, source in sources.items()}
    graph = {name: {way[0] for way in imports(bodies[name], sources)} - {name} for name in bodies}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" imports ".join(error.args[1][::-1])]
    return []


def private_names_of_others(sources: dict[str, str]) -> list[str]:
    found = []
    for name, source in sources.items():
        taken = imports(nodes_of(source), sources)
        modules = {here for _, attribute, here in taken if not attribute}
        used = [f"{module}.{attribute}" for module, attribute, _ in taken]
        attributes = [node for node in nodes_of(source) if isinstance(node, ast.Attribute)]
        used += [ast.unparse(node) for node in attributes if ast.unparse(node.value) in modules]
        found += [f"{name} uses {word}" for word in used if re.search(r"\._(?!_)\w+$", word)]
    return found


def large_functions(sources: dict[str, str]) -> list[str]:
    found = []
    for name, source in sources.items():
        for f in [node for node in nodes_of(source) if isinstance(node, ast.FunctionDef)]:
            lines, parameters = f.end_lineno - f.lineno + 1, len([*f.args.args, *f.args.kwonlyargs])
            most = 60 if (name, f.name) == ("train", "train") else 45
            if lines > most or (parameters > 8 and f.name != "__init__"):
                found.append(f"{name}.{f.name} {lines} lines, {parameters} parameters")
    return found


def lines_to_change(sources: dict[str, str]) -> list[str]:
    found = []
    for name in sources.keys() - {"tests.test_house"}:
        lines = [f"{name}:{i}: {line}" for i, line in enumerate(sources[name].split("\n"), 1)]
        found += [line for line in lines if re.search(rf"{RETIRED}|:\d+: .{{101}}", line)]
    return sorted(found)


LAWS = (wrong_arrows, circles, private_names_of_others, large_functions, lines_to_change)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_files_keep_the_law_of(law):
    assert not law(ALL), "\n".join(law(ALL))


def test_the_top_level_and_the_page_that_people_come_for_stay_small():
    assert len(TOP) <= 16 and len(TOP["train"].splitlines()) <= 200
