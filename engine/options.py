"""Command lines from frozen dataclasses, and subcommands; imports neither torch nor numpy."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import re
import shutil
import sys
from argparse import ArgumentTypeError, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from engine.files import write_json

GROUPS = ("usual", "method", "views", "optimizer", "machine", "files")  # of the help, in this order
FIGURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # formats of --output
READING: dict[type, dict[str, Any]] = {  # type of a field -> how argparse reads it
    bool: dict(action=argparse.BooleanOptionalAction),
    int: dict(type=int, metavar="N"),
    float: dict(type=float, metavar="X"),
    str: dict(type=os.path.expanduser, metavar="NAME"),
}


def option(
    default: Any, help: str, group: str = "usual", low: float = -inf, high: float = inf,
    choices: Iterable = (), free: bool = False, unless: str = "",
) -> Any:  # fmt: skip
    """A field of a dataclass that is an option. In a string, ~ is the home folder.

    help: with unit and origin; low, high: both included; free: a continued run may change it;
    unless: an option that moves this one, which `differences` does not name where both changed.
    """
    about = dict(help=help, group=group, low=low, high=high, choices=choices, free=free)
    return dataclasses.field(default=default, metadata=about | dict(unless=unless))


def add_options(parser: argparse.ArgumentParser, presets: Mapping[str, Any]) -> None:
    """One option per field of the presets' dataclass, in the groups of the help.

    presets: name -> instance, whose first field is that name; the first preset is the default.
    """
    first = next(iter(presets.values()))
    types, by = get_type_hints(type(first)), next(iter(vars(first)))
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for f in dataclasses.fields(first):
        parts = get_args(types[f.name])  # of a tuple
        reading = READING[parts[0] if parts else types[f.name]] | dict(default=argparse.SUPPRESS)
        text = f.metadata["help"]
        choices = tuple(presets if f.name == by else f.metadata["choices"])
        if parts:
            reading["nargs"] = len(parts)
        if choices:
            reading["choices"] = choices
            text += f"; one of {', '.join(map(str, choices))}"
        reading["help"] = (text + _default(presets, f.name, by)).replace("%", "%%")
        groups[f.metadata["group"]].add_argument(flag(f.name), dest=f.name, **reading)


def _default(presets: Mapping[str, Any], field: str, by: str) -> str:
    """The value without the option: the most common one, then the presets that have another."""
    names = defaultdict(list)  # value -> presets
    for name, preset in presets.items():
        value = re.sub("[(),]", "", str(getattr(preset, field)))  # a tuple as it is given
        names[value or "none"].append(name)
    usual, *others = sorted(names, key=lambda value: -len(names[value]))
    others = [f"; {', '.join(names[value])} {value}" for value in others if field != by]
    return f" (default: {usual}{''.join(others)})" if others or usual != "none" else ""


def settle(presets: Mapping[str, Any], args: Namespace) -> tuple[Any, set[str]]:
    """The preset that is named, with the options of `add_options` that were given, and their names.

    Raises ValueError with one line.
    """
    first, preset = next(iter(presets.items()))
    known, by = vars(preset), next(iter(vars(preset)))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in known}
    settings = dataclasses.replace(presets[given.get(by, first)], **given)
    for f in dataclasses.fields(settings):
        value, low, high = getattr(settings, f.name), f.metadata["low"], f.metadata["high"]
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not (low <= number <= high and number < inf):
                expected = f"at least {low}" if high == inf else f"{low} to {high}"
                raise ValueError(f"{flag(f.name)} {number} is out of range: expected {expected}")
    return settings, set(given)


def differences(settings: Any, earlier: Mapping[str, Any]) -> list[str]:
    """Changes of options that are not free, a line each; an option unknown then had its default."""
    changed, kept = {}, [f for f in dataclasses.fields(settings) if not f.metadata["free"]]
    for f in kept:
        pair = earlier.get(f.name, f.default), getattr(settings, f.name)
        pair = [tuple(x) if isinstance(x, list) else x for x in pair]  # JSON has no tuples
        if pair[0] != pair[1]:  # a default of 0 stands for no choice
            none = f.default in ("", 0) and f.default is not False and f.name != "seed"
            pair = ["not given" if none and x == f.default else x for x in pair]
            changed[f.name] = "{}: {} then, {} now".format(f.name, *pair)
    moved = {f.name for f in kept if f.metadata["unless"] in changed}
    return [line for name, line in changed.items() if name not in moved]


def chosen_for(function: Callable, settings: Any) -> dict[str, Any]:
    """The fields of a dataclass whose names are parameters of a function or class."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in vars(settings).items() if name in parameters}


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line. description: a docstring, shown up to its slide."""

    def __init__(self, *args: Any, description: str = "", **given: Any):
        width = shutil.get_terminal_size((100, 24)).columns
        form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=width)
        description = re.split(r"(?m)^(?:Slides?|Paper|Read next)\b", description)[0].strip()
        more = dict(formatter_class=form, allow_abbrev=False, description=description)
        super().__init__(*args, **more, **given)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError."""
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """The options. Raises ValueError for words that are none. Subparsers come here too."""
        found, words = super().parse_known_args(args, namespace)
        lists = [a.dest for a in self._get_positional_actions() if a.nargs in ("*", "+")]
        for word in sorted(words, key=lambda word: not word.startswith("-")):
            if lists and not word.startswith("-"):  # of "a --size 9 b c", b and c
                setattr(found, lists[0], [*getattr(found, lists[0]), path(word)])
                continue
            known = self._option_string_actions
            name = word.partition("=")[0]  # --lr: --base-lr; --batch: --batch-size
            near = [each for each in known if each.startswith(name) or each.endswith(name[1:])]
            if not (near and name.startswith("--") and name[2:]):
                near = difflib.get_close_matches(name, known, 1)
            if "--data-dir" in known and os.path.exists(word):
                near = [f"--data-dir {word}"]
            advice = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"unrecognized argument {word}{advice}")
        return found, []


class Commands(Parser):
    """The parser of a program with subcommands."""

    def __init__(self, program: str, description: str):
        super().__init__(program, description=description)
        self.known = self.add_subparsers(dest="command", required=True, parser_class=Parser)

    def add(self, name: str, text: str) -> Parser:
        """A subcommand -> its parser."""
        parser = self.known.add_parser(name, help=text, description=text)
        self.known.metavar = " | ".join(self.known.choices)
        text = "write the result as JSON; -: to stdout, tables to stderr"
        parser.add_argument("--json", type=path, metavar="FILE", help=text)
        return parser

    def run(self, argv: Sequence[str] | None, functions: Mapping[str, Callable]) -> int:
        """Calls the function of the subcommand, args -> what --json writes; returns the status."""
        args = self.parse_args(argv)
        to_stdout = args.json == Path("-")
        if args.json:
            check_writable(args.json, "--json")
        if "device" in args:  # then a torch device
            from engine.processes import pick_device

            args.device = pick_device(args.device)
        with contextlib.redirect_stdout(sys.stderr if to_stdout else sys.stdout):
            result = dict(command=args.command, **functions[args.command](args))
        if to_stdout:
            print(json.dumps(result, indent=1))
        elif args.json:
            write_json(args.json, result)
        return 0


def add_checkpoint(parser: Parser) -> None:
    """The checkpoint, --network and --device."""
    add = parser.add_argument
    text = "last.pth of a run, the folder of the run, or a released checkpoint; sizes come from it"
    add("checkpoint", type=checkpoint_path, help=text)
    text = "which of its two networks (default: teacher)"
    add("--network", choices=("teacher", "student"), default="teacher", help=text)
    text = "auto: a GPU if there is one (default: auto)"
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)


def add_images(parser: Parser, text: str) -> None:
    """--data-dir, and how images are read from it."""
    add = parser.add_argument
    add("--data-dir", type=path, metavar="PATH", help=text)
    text = "use N images only, evenly spaced; 0: all (default: 0)"
    add("--limit", type=whole, default=0, metavar="N", help=text)
    text = "images at a time; changes no result (default: 16)"
    add("--batch-size", type=positive, default=16, metavar="N", help=text)
    text = "processes that decode images; 2 to 8 help on a GPU (default: 0)"
    add("--workers", type=whole, default=0, metavar="N", help=text)


def add_output(parser: Parser, default: str) -> None:
    """--output; default: the name in words."""
    text = f"file or folder of the figure (default: {default})"
    parser.add_argument("--output", type=path, metavar="FILE", help=text)


def output_file(chosen: Path | None, default: Path) -> Path:
    """The default, or --output; in a folder, the default's name. Raises ValueError."""
    file = chosen or default
    file = file / default.name if file.is_dir() else file
    if file.suffix.lower() not in FIGURES:
        raise ValueError(f"--output {file}: expected a folder or a name in {', '.join(FIGURES)}")
    check_writable(file, "--output")
    return file


def check_writable(file: Path, option: str) -> None:
    """Makes the folder of a file. Raises ValueError where it cannot be written to."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    no_file = file.exists() and not file.is_file()  # but a folder, a pipe, a device
    if no_file or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"cannot write {file}: give another place by {option}")


def path(text: str | Path) -> Path:
    """A file or folder; ~ is the home folder."""
    return Path(text).expanduser()


def checkpoint_path(text: str | Path) -> Path:
    """A checkpoint; of a folder, the last.pth in it."""
    file = path(text)
    return file / "last.pth" if file.is_dir() else file


def _at_least(low: int, text: str) -> int:
    if not text.isdecimal() or int(text) < low:
        raise ArgumentTypeError(f"{text}: expected a whole number, at least {low}")
    return int(text)


whole = partial(_at_least, 0)
positive = partial(_at_least, 1)
# --size, px. In smaller views the reflect padding of a backbone can be wider than its map.
side = partial(_at_least, 32)
