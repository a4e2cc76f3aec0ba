"""The laws of the house (CONTRIBUTING.md), each read from the syntax trees of all files.

Every law is a function of a mapping from module names to sources and returns what breaks it, one
line each. The first group of tests holds the laws against our files; the second changes one source
of the mapping so that a law is broken, and asks that it is reported.
"""

import ast
import itertools
import random
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("train", "evaluate", "visualize", "compare", "transfer", "export")
METHOD = ("backbone", "grouping", "slots", "losses", "teacher", "slotcon")
SETTINGS = ("recipes", "planning")  # neither noun nor verb
FOLDERS = ("engine", "measures", "comparisons", "downstream")
PATH = (*METHOD, "data", "photometric", "train", "evaluate", "visualize")
SIDE_TRIPS = ("toy", "slot_attention", "recipes")
WIDTH, MOST_LINES_OF_TRAIN, MOST_LINES_OF_THE_LOOP = 100, 260, 90

# Law -> files that do not keep it yet. Empty at the end; a file that keeps its law must leave.
TO_MEND: dict[str, set[str]] = {}

# (test file, what it replaces) -> why an object that is given would not do.
SIZE = "the size of a block: a small one lets small inputs cross its seams"
NOT_CALLED = "shows that a step which no view needs is not even called"
PATCHES_ALLOWED = {
    ("tests.test_losses", "losses.MOST_LOGITS"): SIZE,
    ("tests.test_photometric", "photometric.CPU_BLOCK"): SIZE,
    ("tests.test_photometric", "photometric.CPU_CHUNK"): SIZE,
    ("tests.test_photometric", "photometric.name"): NOT_CALLED,  # each name of a list
    ("tests.test_photometric", "photometric.turn_hue"): NOT_CALLED,
    ("tests.test_photometric", "photometric.gaussian_blur"): NOT_CALLED,
    ("tests.test_data", "data.draw_crop"): "two known crops in place of what would be drawn",
}


def module_name(file: Path) -> str:
    """engine/batches.py -> engine.batches; engine/__init__.py -> engine."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources_of(*patterns: str) -> dict[str, str]:
    """Module name -> source of the files of the repository that match."""
    files = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    return {module_name(file): file.read_text(encoding="utf-8") for file in files}


OURS = sources_of("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
TESTS = sources_of("tests/*.py")
BENCHMARKS = sources_of("benchmarks/*.py")


# ------------------------------------------------------------------------------ reading a source


@cache
def tree_of(source: str) -> ast.Module:
    """The syntax tree; equal sources share one."""
    return ast.parse(source)


@cache
def names_bound(name: str, source: str, ours: frozenset[str]) -> list[tuple[str, str, str]]:
    """Each import of our modules, wherever it stands in the file: (module, what is taken of it or
    "", the name it has here).
    """
    found = []
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in ours:
                    bound = alias.asname or alias.name.partition(".")[0]
                    found.append((alias.name, "", bound))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")[: -node.level]
                base = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                bound = alias.asname or alias.name
                if f"{base}.{alias.name}".lstrip(".") in ours:
                    found.append((f"{base}.{alias.name}".lstrip("."), "", bound))
                elif base in ours:
                    found.append((base, alias.name, bound))
    return found


def arrows(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> our modules that it imports."""
    ours = frozenset(sources)
    return {
        name: {module for module, *_ in names_bound(name, source, ours)} - {name}
        for name, source in sources.items()
    }


def folder_of(name: str) -> str:
    """engine.batches -> engine; "" for a file of the top level."""
    return name.partition(".")[0] if name.partition(".")[0] in FOLDERS else ""


# --------------------------------------------------------------------------------------- the laws


def verbs_that_import_verbs(sources: dict[str, str]) -> list[str]:
    """A program holds no library: nobody needs anything of it."""
    return [
        f"{name} imports the verb {other}"
        for name, others in arrows(sources).items()
        for other in sorted(others)
        if name in VERBS and other in VERBS
    ]


def nouns_that_look_up(sources: dict[str, str]) -> list[str]:
    """A noun of the top level imports neither a verb nor the configuration; recipes and planning,
    which is about a configuration, are neither noun nor verb, and import no verb.
    """
    return [
        f"{name} imports {other}"
        for name, others in arrows(sources).items()
        for other in sorted(others)
        if not folder_of(name) and name not in VERBS
        if other in VERBS or (other in SETTINGS and name not in SETTINGS)
    ]


def folders_that_look_up(sources: dict[str, str]) -> list[str]:
    """The engine and the measures take plain values: no configuration, no verb."""
    return [
        f"{name} imports {other}"
        for name, others in arrows(sources).items()
        for other in sorted(others)
        if folder_of(name) and (other in VERBS or other in SETTINGS)
    ]


def methods_that_see_the_engine(sources: dict[str, str]) -> list[str]:
    """Of the engine a method file may use the rank helpers only."""
    return [
        f"{name} imports {other}"
        for name, others in arrows(sources).items()
        for other in sorted(others)
        if name in METHOD and folder_of(other) and other not in ("engine", "engine.ranks")
    ]


def circles(sources: dict[str, str]) -> list[str]:
    """Files that import each other, directly or on a way around: one line per circle."""
    graph, done, found = arrows(sources), set(), []

    def follow(name, way):
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                follow(other, [*way, name])
            done.add(name)

    for name in graph:
        follow(name, [])
    return found


def is_private(name: str) -> bool:
    """_name, but neither __name__ nor the public methods of named tuples."""
    dunder = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not dunder and name not in ("_", "_replace", "_fields")


def private_names_defined(source: str) -> set[str]:
    """Private functions, classes, attributes and variables that a file makes."""
    found = set()
    for node in ast.walk(tree_of(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def private_names_of_others(sources: dict[str, str]) -> list[str]:
    """Uses of a private name that another file of ours makes."""
    ours = frozenset(sources)
    theirs = {name: private_names_defined(source) for name, source in sources.items()}
    found = []
    for name, source in sources.items():
        own = private_names_defined(source)
        others = set().union(*(names for other, names in theirs.items() if other != name))
        for module, taken, _ in names_bound(name, source, ours):
            if is_private(taken):
                found.append(f"{name} takes {taken} of {module}")
        for node in ast.walk(tree_of(source)):
            if isinstance(node, ast.Attribute) and node.attr in others - own:
                found.append(f"{name}:{node.lineno} uses {node.attr}")
    return found


def patched_globals(
    tests: dict[str, str], allowed: Collection[tuple[str, str]] | None = None
) -> list[str]:
    """Tests that replace a global of one of our modules: monkeypatch.setattr, mock.patch, or a
    plain assignment to an attribute of the module.
    """
    names, allowed = frozenset(OURS), PATCHES_ALLOWED if allowed is None else allowed
    found = []
    for test, source in tests.items():
        imports = names_bound(test, source, names)
        bound = {here: module for module, taken, here in imports if not taken}

        def module_at(node, bound=bound):
            """The module of ours that an expression is, or ""."""
            text = ast.unparse(node)
            return bound.get(text, text if text in names else "")

        for node in ast.walk(tree_of(source)):
            what = ""
            if isinstance(node, ast.Call) and node.args:
                called, first = ast.unparse(node.func), node.args[0]
                module = module_at(first) if len(node.args) > 1 else ""
                if module and called.endswith(("setattr", "delattr", "patch.object", "patch.dict")):
                    what = f"{module}.{ast.unparse(node.args[1]).strip(chr(39))}"
                if called.endswith(("setattr", "delattr", "patch")):
                    text = first.value if isinstance(first, ast.Constant) else ""
                    if isinstance(text, str) and text.rpartition(".")[0] in names:
                        what = text
            changed = isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
            if changed and module_at(node.value):
                what = f"{module_at(node.value)}.{node.attr}"
            if what and (test, what) not in allowed:
                found.append(f"{test}:{node.lineno} replaces {what}")
    return found


def broken_path(sources: dict[str, str]) -> list[str]:
    """The "Read next" of every file of the path names the one that follows; a side trip names a
    file of the path and is named by one, and all files that are named exist.
    """
    found, said = [], {}
    for name in (*PATH, *SIDE_TRIPS):
        text = " ".join((ast.get_docstring(tree_of(sources.get(name, ""))) or "").split())
        links = re.findall(r"Read next: ([\w/]+)\.py", text)
        if len(links) != 1 and name != PATH[-1]:
            found.append(f"{name} names {len(links)} files to read next")
        said[name] = (links[0] if links else "", text)
    for name, follows in itertools.pairwise(PATH):
        if said[name][0] and said[name][0] != follows:
            found.append(f"{name} leads to {said[name][0]}, not to {follows}")
    for name in SIDE_TRIPS:
        if said[name][0] and said[name][0] not in PATH:
            found.append(f"{name} leads to {said[name][0]}, not to the path")
        trip = re.compile(rf"[Ss]ide trips?:.*\b{name}\.py")
        if not any(trip.search(said[other][1]) for other in PATH):
            found.append(f"no file of the path names {name}")
    return found


def without_hints_or_docstring(sources: dict[str, str]) -> list[str]:
    """Public functions, classes and methods without a docstring, or with a parameter or return that
    has no type. Special methods need types only; a method that overrides one of a class of torch
    or Python is documented there, so dunder names need no docstring.
    """
    found = []

    def look(name, node, where):
        if isinstance(node, ast.ClassDef):
            if node.name.startswith("_"):
                return
            if not ast.get_docstring(node):
                found.append(f"{name}: {where}{node.name} has no docstring")
            for child in node.body:
                look(name, child, f"{where}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            dunder = node.name.startswith("__") and node.name.endswith("__")
            if node.name.startswith("_") and not dunder:
                return
            if not dunder and not ast.get_docstring(node):
                found.append(f"{name}: {where}{node.name} has no docstring")
            a = node.args
            parameters = [*a.posonlyargs, *a.args]
            static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
            if where and not static:
                parameters = parameters[1:]  # self
            parameters += [*a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            bare = [p.arg for p in parameters if p.annotation is None and p.arg != "_"]
            if node.name != "__init__" and node.returns is None:
                bare.append("return")
            if bare:
                found.append(f"{name}: {where}{node.name} has no type for {', '.join(bare)}")

    for name, source in sources.items():
        for node in tree_of(source).body:
            look(name, node, "")
    return found


def files_without_a_header(sources: dict[str, str]) -> list[str]:
    """Every file opens with what it is, the slide or "none", and where we differ."""
    found = []
    for name, source in sources.items():
        text = ast.get_docstring(tree_of(source)) or ""
        missing = [word for word in ("Slide", "Paper", "Differs") if word not in text]
        if missing and name not in FOLDERS:
            found.append(f"{name} says nothing of {', '.join(missing)}")
    return found


def too_wide(sources: dict[str, str]) -> list[str]:
    """Lines of more than 100 columns."""
    return [
        f"{name}:{number} has {len(line)} columns"
        for name, source in sources.items()
        for number, line in enumerate(source.splitlines(), 1)
        if len(line) > WIDTH
    ]


def too_long(sources: dict[str, str]) -> list[str]:
    """train.py is a table of contents."""
    found, source = [], sources["train"]
    if len(source.splitlines()) > MOST_LINES_OF_TRAIN:
        found.append(f"train has {len(source.splitlines())} lines")
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "train":
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES_OF_THE_LOOP:
                found.append(f"train() has {lines} lines")
    return found


# Names of axes in einops patterns; what else may stand in a pattern is a number, 1 or (...).
AXES = {"b", "v", "k", "d", "c", "h", "w", "y", "x", "n", "m", "t"}
# Axes with a name of their own where they are made: the place in a sequence of blends, the tap of a
# blur, and i and r, which number what no other file sees.
LOCAL_AXES = {
    "photometric": {"place", "tap", "i"},
    "losses": {"i", "r"},
    "measures.color_groups": {"rgb"},
    "measures.figures": {"rgb"},
    "measures.probes": {"i"},
}


def unknown_axes(sources: dict[str, str]) -> list[str]:
    """einops patterns with an axis that is not in the README's vocabulary."""
    found = []
    for name, source in sources.items():
        for node in ast.walk(tree_of(source)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id not in ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack"):
                continue
            for argument in node.args:
                if isinstance(argument, ast.Constant) and "->" in str(argument.value):
                    axes = set(re.findall(r"[A-Za-z]\w*", argument.value))
                    strange = axes - AXES - LOCAL_AXES.get(name, set())
                    if strange:
                        axis = ", ".join(sorted(strange))
                        found.append(f"{name}:{node.lineno} knows no axis {axis}")
    return found


# ------------------------------------------------------------------------- the laws, on our files

ALL = {**OURS, **TESTS, **BENCHMARKS}
LAWS = {
    law.__name__: (law, sources)
    for law, sources in (
        (verbs_that_import_verbs, OURS),
        (nouns_that_look_up, OURS),
        (folders_that_look_up, OURS),
        (methods_that_see_the_engine, OURS),
        (circles, ALL),
        (private_names_of_others, ALL),
        (patched_globals, ALL),
        (broken_path, OURS),
        (without_hints_or_docstring, OURS),
        (files_without_a_header, OURS),
        (too_wide, ALL),
        (too_long, OURS),
        (unknown_axes, OURS),
    )
}


def file_of(line: str) -> str:
    """The file that a reported line is about."""
    return re.match(r"[\w.]+", line)[0].rstrip(".")


@pytest.mark.parametrize("name", LAWS)
def test_a_law_holds_for_every_file_but_those_that_are_listed(name):
    law, sources = LAWS[name]
    broken = law(sources)
    waiting = TO_MEND.get(name, set())
    assert [line for line in broken if file_of(line) not in waiting] == []
    assert waiting <= {file_of(line) for line in broken}, "mended: take these out of TO_MEND"


def test_every_patch_that_is_allowed_is_there_and_has_a_reason():
    lines = patched_globals(ALL, {})
    found = {(line.partition(":")[0], line.rpartition(" replaces ")[2]) for line in lines}
    assert set(PATCHES_ALLOWED) <= found
    assert all(len(reason.split()) > 3 for reason in PATCHES_ALLOWED.values())


# ---------------------------------------------------------- a law that is broken must be reported


def changed(name: str, *lines: str) -> dict[str, str]:
    """Our sources with lines added at the end of one."""
    return {**OURS, name: "\n".join([OURS.get(name, ""), *lines, ""])}


def added(law, sources: dict[str, str]) -> list[str]:
    """What a law reports of changed sources and not of ours."""
    return sorted(set(law(sources)) - set(law(OURS)))


@pytest.mark.parametrize(
    "line",
    [
        "import evaluate",
        "import evaluate as judge",
        "from evaluate import main",
        "def late():\n    from evaluate import main",
        "if False:\n    import evaluate",
    ],
)
def test_a_verb_that_imports_a_verb_is_reported_wherever_the_import_stands(line):
    found = added(verbs_that_import_verbs, changed("train", line))
    assert found == ["train imports the verb evaluate"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_will_exist_is_known(verb):
    other = "train" if verb != "train" else "evaluate"
    sources = {verb: f"import {other}", other: ""}
    assert verbs_that_import_verbs(sources) == [f"{verb} imports the verb {other}"]


@pytest.mark.parametrize("other", ["train", "recipes"])
def test_a_noun_that_imports_a_verb_or_the_configuration_is_reported(other):
    sources = changed("slots", f"from {other} import Config")
    assert added(nouns_that_look_up, sources) == [f"slots imports {other}"]


def test_recipes_may_import_nouns_but_no_verb():
    assert added(nouns_that_look_up, changed("recipes", "import losses")) == []
    found = added(nouns_that_look_up, changed("recipes", "import train"))
    assert found == ["recipes imports train"]


@pytest.mark.parametrize("name", ["engine.run", "measures.metrics"])
@pytest.mark.parametrize("other", ["recipes", "train"])
def test_an_engine_or_a_measure_that_sees_the_configuration_or_a_verb_is_reported(name, other):
    sources = changed(name, f"def late():\n    from {other} import Config")
    assert added(folders_that_look_up, sources) == [f"{name} imports {other}"]


@pytest.mark.parametrize(
    "line", ["from engine import undo", "import engine.undo", "from engine.undo import Undo"]
)
def test_a_method_file_that_sees_more_of_the_engine_than_the_ranks_is_reported(line):
    found = added(methods_that_see_the_engine, changed("teacher", line))
    assert found == ["teacher imports engine.undo"]
    allowed = line.replace("undo", "ranks")
    assert added(methods_that_see_the_engine, changed("teacher", allowed)) == []


def test_a_circle_is_reported_with_its_way():
    circle = {"a": "import b", "b": "from c import x", "c": "def f():\n    import a"}
    assert circles(circle) == ["a -> b -> c -> a"]
    assert circles({"a": "import b\nimport c", "b": "import c", "c": ""}) == []
    assert any("backbone" in line for line in circles(changed("backbone", "import slotcon")))


@pytest.mark.parametrize(
    "line, says",
    [
        ("from engine.loader import _arrived", "train takes _arrived of engine.loader"),
        ("loader._arrived(1)", r"train:\d+ uses _arrived"),
    ],
)
def test_a_private_name_of_another_file_is_reported(line, says):
    (found,) = added(private_names_of_others, changed("train", line))
    assert re.fullmatch(says, found)


def test_private_names_of_ones_own_and_the_methods_of_named_tuples_are_free():
    lines = ("def _mine():\n    pass", "_mine()", "x._replace(y=1)", "torch._foreach_add_([])")
    assert added(private_names_of_others, changed("train", *lines)) == []


@pytest.mark.parametrize(
    "line",
    [
        "monkeypatch.setattr(losses, 'pair_slots', None)",
        "monkeypatch.setattr('losses.pair_slots', None)",
        "mock.patch('losses.pair_slots')",
        "mock.patch.object(losses, 'pair_slots')",
        "losses.pair_slots = None",
        "setattr(losses, 'pair_slots', None)",
        "del losses.pair_slots",
    ],
)
def test_a_patched_global_of_ours_is_reported(line):
    found = patched_globals({"tests.test_x": f"import losses\n{line}"})
    assert found == ["tests.test_x:2 replaces losses.pair_slots"]


def test_patches_of_objects_and_of_other_peoples_modules_are_free():
    lines = (
        "import losses, os, train",
        "monkeypatch.setattr(os, 'replace', None)",
        "run.batches.next = None",
        "monkeypatch.setattr(run.keeper, 'trouble', '')",
    )
    assert patched_globals({"tests.test_x": "\n".join(lines)}) == []


@pytest.mark.parametrize(
    "name, old, new, says",
    [
        ("backbone", "grouping.py", "slots.py", "backbone leads to slots, not to grouping"),
        ("backbone", "Read next: ", "", "backbone names 0 files to read next"),
        (
            "grouping",
            "Read next: slots.py",
            "Read next: slots.py. Read next: data.py",
            "grouping names 2 files to read next",
        ),
        ("slots", "slot_attention.py", "it", "no file of the path names slot_attention"),
        ("recipes", "Read next: train", "Read next: toy", "recipes leads to toy, not to the path"),
    ],
)
def test_a_broken_path_is_reported(name, old, new, says):
    assert old in OURS[name]
    assert added(broken_path, {**OURS, name: OURS[name].replace(old, new)}) == [says]


def test_a_file_of_the_path_that_is_gone_is_reported():
    without = {name: source for name, source in OURS.items() if name != "teacher"}
    assert "teacher names 0 files to read next" in broken_path(without)


@pytest.mark.parametrize(
    "source, says",
    [
        ("def f(a, b: int) -> int:\n    'd'", "f has no type for a"),
        ("def f(*a, **b) -> int:\n    'd'", "f has no type for a, b"),
        ("def f():\n    'd'", "f has no type for return"),
        ("def f() -> int:\n    pass", "f has no docstring"),
        ("class A:\n    pass", "A has no docstring"),
        ("class A:\n    'd'\n    def f(self) -> int:\n        pass", "A.f has no docstring"),
        (
            "class A:\n    'd'\n    def __init__(self, a):\n        0",
            "A.__init__ has no type for a",
        ),
    ],
)
def test_a_public_name_without_types_or_docstring_is_reported(source, says):
    assert without_hints_or_docstring({"x": source}) == [f"x: {says}"]


def test_private_and_inner_functions_need_neither():
    source = "def _f(a):\n    pass\ndef g() -> None:\n    'd'\n    def h(a):\n        pass"
    assert without_hints_or_docstring({"x": source}) == []


def test_a_file_without_slide_paper_and_difference_is_reported():
    found = files_without_a_header({"x": "'Slide: none. Paper: none.'"})
    assert found == ["x says nothing of Differs"]


def test_a_wide_line_a_long_program_and_a_long_loop_are_reported():
    assert too_wide({"x": "#" * 100 + "\n" + "#" * 101}) == ["x:2 has 101 columns"]
    assert too_long({"train": "#\n" * 261}) == ["train has 261 lines"]
    assert too_long({"train": "def train():\n" + "    f()\n" * 90}) == ["train() has 91 lines"]
    assert too_long({"train": "def train():\n" + "    f()\n" * 89}) == []


def test_an_axis_outside_of_the_vocabulary_is_reported():
    found = unknown_axes({"x": "rearrange(a, 'b q -> q b')\nreduce(a, 'b (h w) -> b h w', w=2)"})
    assert found == ["x:1 knows no axis q"]


# ------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("again", [False, True])
def test_every_test_starts_from_the_same_random_numbers(again):
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
