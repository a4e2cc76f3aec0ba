"""Command lines: one option per field of a frozen dataclass, subcommands, types of arguments.

Imports neither torch nor numpy, so that a misspelled option is answered at once.
"""

from __future__ import annotations

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
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine import SUFFIXES
from engine.files import write_json

T = TypeVar("T")
Command = Callable[[argparse.Namespace], dict]  # options -> the result, which --json writes

GROUPS = ("usual", "method", "views", "optimizer", "machine", "files")  # of the help, in this order
FIGURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # formats of --output
METAVARS = {int: "N", float: "X", str: "PATH"}

# ------------------------------------------------------------------------- dataclass -> settings


def option(
    default: Any,
    help: str,
    group: str = "usual",
    low: float | None = None,
    high: float | None = None,
    choices: Iterable | None = None,
    free: bool = False,
    also: Sequence[str] = (),
) -> Any:
    """A field of a dataclass that is an option.

    help: with unit and origin; group: one of GROUPS; low, high: allowed range, both included;
    free: a run that is continued may change it. A string without choices names a file or folder.
    """
    if group not in GROUPS:
        raise ValueError(f"unknown group {group}: choose one of {', '.join(GROUPS)}")
    about = dict(help=help, group=group, low=low, high=high, choices=choices, free=free, also=also)
    return dataclasses.field(default=default, metadata=about)


def parse(
    presets: Mapping[str, T], argv: Sequence[str] | None, description: str, by: str = "preset"
) -> tuple[T, set[str]]:
    """The command line -> the preset it names, with the given options replaced; and the names of
    those given.

    presets: name -> instance of one dataclass; the first is the default. by: the field that names
    a preset. Raises ValueError with one line for an unknown option, preset or choice, and for a
    number out of range.
    """
    parser = Parser(description=description, usage="%(prog)s [options]")
    add_options(parser, presets, by)
    return settle(presets, parser.parse_args(argv), by)


def add_options(
    parser: argparse.ArgumentParser, presets: Mapping[str, Any], by: str = "preset"
) -> None:
    """One option per field of the presets' dataclass, in the groups of the help."""
    first = next(iter(presets.values()))
    types = typing.get_type_hints(type(first))
    for group in GROUPS:
        fields = [f for f in dataclasses.fields(first) if f.metadata["group"] == group]
        section = parser.add_argument_group(f"{group} options") if fields else parser
        for f in fields:
            choices = tuple(presets) if f.name == by else f.metadata["choices"]
            listed = f"; one of {', '.join(map(str, choices))}" if choices else ""
            text = f"{f.metadata['help']}{listed}{_default(presets, f, by)}".replace("%", "%%")
            section.add_argument(
                flag(f.name),
                *f.metadata["also"],
                dest=f.name,
                default=argparse.SUPPRESS,
                help=text,
                **_reading(types[f.name], "NAME" if choices else ""),
            )


def _reading(kind: Any, metavar: str) -> dict[str, Any]:
    """How argparse reads a field of this type. metavar: "" is the one of the type."""
    if kind in (bool, bool | None):
        return dict(action=argparse.BooleanOptionalAction)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        return dict(type=parts[0], nargs=len(parts), metavar=METAVARS[parts[0]])
    reader = os.path.expanduser if kind is str else kind
    return dict(type=reader, metavar=metavar or METAVARS[kind])


def settle(
    presets: Mapping[str, T], args: argparse.Namespace, by: str = "preset"
) -> tuple[T, set[str]]:
    """What was given on the command line, over the preset it names; and the names of what was
    given. Raises ValueError for an unknown preset or choice and for a number out of range.
    """
    first = next(iter(presets))
    names = {f.name for f in dataclasses.fields(presets[first])}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in names}
    chosen = given.get(by, first)
    if chosen not in presets:
        raise ValueError(_not_a_choice(flag(by), chosen, presets))
    settings = dataclasses.replace(presets[chosen], **given)
    check_ranges(settings)
    return settings, set(given)


def check_ranges(settings: Any) -> None:
    """Every number in its range, every choice among the choices. Raises ValueError for the first
    that is not.
    """
    for f in dataclasses.fields(settings):
        value, choices = getattr(settings, f.name), f.metadata["choices"]
        low, high = f.metadata["low"], f.metadata["high"]
        if choices and value not in choices:
            raise ValueError(_not_a_choice(flag(f.name), value, choices))
        for number in value if isinstance(value, tuple) else (value,):
            # `not >=` rather than `<`, so that nan is out of range too
            if (low is not None and not number >= low) or (high is not None and not number <= high):
                expected = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{flag(f.name)} {number} is out of range: expected {expected}")


def differences(settings: Any, earlier: Mapping[str, Any]) -> list[str]:
    """What differs in the options that are not free, as "name: EARLIER then, NOW now".

    A field that the earlier settings did not have counts as its default.
    """
    found = []
    for f in dataclasses.fields(settings):
        now, then = getattr(settings, f.name), earlier.get(f.name, f.default)
        # Tuples come back from JSON as lists
        as_read = list(now) if isinstance(now, tuple) else now
        same = as_read == (list(then) if isinstance(then, tuple) else then)
        if not f.metadata["free"] and not same:
            found.append(f"{f.name}: {then} then, {now} now")
    return found


def chosen_for(function: Callable, settings: Any) -> dict[str, Any]:
    """The fields of a dataclass whose names are parameters of a function or class."""
    names = {f.name for f in dataclasses.fields(settings)}
    parameters = inspect.signature(function).parameters
    return {name: getattr(settings, name) for name in parameters if name in names}


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def _default(presets: Mapping[str, Any], f: dataclasses.Field, by: str) -> str:
    """The value without the option: the most common one, and the presets that have another."""
    if f.name == by:
        return f" (default: {next(iter(presets))})"
    names: dict[str, list[str]] = {}
    for name, preset in presets.items():
        names.setdefault(_in_words(getattr(preset, f.name)), []).append(name)
    usual = max(names, key=lambda value: len(names[value]))
    others = [f"{', '.join(names[value])} {value}" for value in names if value != usual]
    if usual == "none" and not others:
        return ""
    return f" (default: {'; '.join([usual, *others])})"


def _in_words(value: Any) -> str:
    """A value as the help shows it, which is how it is given on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(_in_words, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in ("", None) else str(value)


# ------------------------------------------------------------------------------------ the parser


class _Format(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, or of 100 columns where there is none."""

    def __init__(self, prog: str):
        width = max(60, shutil.get_terminal_size((100, 24)).columns)
        super().__init__(prog, max_help_position=28, width=width)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose complaints are one line, raised as ValueError.

    description: the docstring of the program; the help shows its beginning.
    """

    def __init__(self, *args: Any, description: str | None = None, **options: Any):
        options = dict(formatter_class=_Format, allow_abbrev=False) | options
        super().__init__(*args, description=beginning(description or ""), **options)

    def error(self, message: str) -> NoReturn:
        """Raises ValueError. A wrong choice is answered with the nearest one."""
        wrong = re.fullmatch(r"argument (.+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            name, value, choices = wrong.groups()
            name = name if name.startswith("-") else "command"
            message = _not_a_choice(name, value, choices.replace("'", "").split(", "))
        raise ValueError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        """The options. Raises ValueError for words that are none."""
        found, unknown = self.parse_known_args(args, namespace)
        refuse(unknown)
        return found

    def parse_known_args(
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; also subparsers are called here. Raises ValueError for unknown options."""
        found, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            if word.startswith("-"):
                name = word.partition("=")[0]
                near = difflib.get_close_matches(name, self._option_string_actions, 1)
                advice = f": did you mean {near[0]}?" if near else ""
                raise ValueError(f"unrecognized option {name}{advice}")
        return found, unknown


def beginning(docstring: str) -> str:
    """The docstring of a program up to the line of its slide, which is for readers of the code."""
    return re.split(r"^(?:Slides?|Papers?|Read next)\b", docstring, maxsplit=1, flags=re.M)[
        0
    ].strip()


def refuse(words: Sequence[str]) -> None:
    """Raises ValueError for words that are no options. Of many, as an unquoted * makes of one, only
    the first is named.
    """
    if words:
        more = f" and {len(words) - 1} more" if len(words) > 1 else ""
        advice = "; give the folder, or put a pattern into quotes" if len(words) > 4 else ""
        raise ValueError(f"unrecognized arguments: {words[0]}{more}{advice}")


def _not_a_choice(name: str, value: Any, choices: Iterable) -> str:
    """The complaint about a wrong choice."""
    words = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value), words, 1)
    advice = f" (did you mean {near[0]}?)" if near else ""
    return f"{name} {value}: choose one of {', '.join(words)}{advice}"


# ------------------------------------------------------------------------------------ subcommands


class Commands:
    """The subcommands of a program. description: the docstring of its file."""

    def __init__(self, program: str, description: str):
        self.parser = Parser(program, description=description)
        self.subparsers = self.parser.add_subparsers(dest="command", required=True)

    def add(self, name: str, text: str, paths: str = "") -> argparse.ArgumentParser:
        """A subcommand; text: what it does, one line. Returns its parser, to add options to.

        paths: the name of its positional list of paths, if it has one.
        """
        parser = self.subparsers.add_parser(name, help=text, description=text)
        parser.set_defaults(paths=paths)
        text = "write the result as JSON; -: to stdout, tables to stderr"
        parser.add_argument("--json", type=path, metavar="FILE", help=text)
        return parser

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options. Raises ValueError with one line."""
        self.subparsers.metavar = " | ".join(self.subparsers.choices)
        args, unknown = self.parser.parse_known_args(argv)
        if args.paths:
            # argparse fills a positional list from one place only: "a --size 9 b c" leaves b and c.
            getattr(args, args.paths).extend(map(path, unknown))
        else:
            refuse(unknown)
        return args

    def run(self, argv: Sequence[str] | None, functions: Mapping[str, Command]) -> int:
        """Calls the function of the subcommand and writes its result. Returns the exit status.

        args.device becomes a torch device. Raises ValueError with one line.
        """
        args = self.parse(argv)
        to_stdout = args.json == Path("-")
        if args.json and not to_stdout:
            check_writable(args.json, "--json")
        if "device" in args:
            from engine.processes import pick_device  # imports torch

            args.device = pick_device(args.device)
        with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
            result = dict(command=args.command, **functions[args.command](args))
        if to_stdout:
            print(json.dumps(result, indent=1))
        elif args.json:
            write_json(args.json, result)
        return 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, --network and --device."""
    add = parser.add_argument
    text = "last.pth of a run, the folder of the run, or a released checkpoint; sizes come from it"
    add("checkpoint", type=checkpoint_path, help=text)
    text = "which of its two networks (default: teacher)"
    add("--network", choices=("teacher", "student"), default="teacher", help=text)
    text = "auto: a GPU if there is one (default: auto)"
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)


def add_images(parser: argparse.ArgumentParser, text: str) -> None:
    """--data-dir and how images are read from it; text: what the folder holds."""
    add = parser.add_argument
    add("--data-dir", type=folder, help=text)
    text = "use N images only, evenly spaced, for a quick try; 0: all (default: 0)"
    add("--limit", type=whole, default=0, metavar="N", help=text)
    text = "images at a time; changes no result (default: 16)"
    add("--batch-size", type=positive, default=16, metavar="N", help=text)
    text = "processes that decode images; 2 to 8 help on a GPU (default: 0)"
    add("--workers", type=whole, default=0, metavar="N", help=text)


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """--output; default: the name in words."""
    text = f"file or folder of the figure (default: {default})"
    parser.add_argument("--output", type=path, metavar="FILE", help=text)


def output_file(chosen: Path | None, default: Path) -> Path:
    """Where the figure goes: the default, or --output; in a folder, the default's name.

    Raises ValueError, before any work is done, where the file cannot be written.
    """
    file = chosen or default
    if file.is_dir():
        file = file / default.name
    if file.suffix.lower() not in FIGURES:
        raise ValueError(
            f"--output {file}: expected a folder, or a name that ends in one of "
            f"{', '.join(FIGURES)}"
        )
    check_writable(file, "--output")
    return file


def check_writable(file: Path, option: str) -> None:
    """Makes the folder of a file. Raises ValueError where it cannot be written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder of {file}: {error.strerror}") from None
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise ValueError(f"cannot write {file}: give another place by {option}")


# ------------------------------------------------------------------------------ types of arguments


def path(text: str) -> Path:
    """A file or folder; ~ is the home folder."""
    return Path(text).expanduser()


def whole(text: str) -> int:
    """A number from 0 on. argparse reports the error of a type as one line."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A number from 1 on."""
    return _at_least(1, text)


def side(text: str) -> int:
    """The type of --size, px: from 32 on, as --image-size of train.py.

    Below that the reflect padding of a backbone can be wider than its map.
    """
    return _at_least(32, text)


def _at_least(low: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if number < low:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected at least {low}")
    return number


def checkpoint_path(text: str) -> Path:
    """A checkpoint; of a folder, the last.pth in it."""
    file = _no_image(text, "the checkpoint (last.pth, or the folder of a run)")
    if not file.is_dir():
        return file
    if not (file / "last.pth").is_file():
        others = ", ".join(sorted(each.name for each in file.glob("*.pth"))[:5])
        raise argparse.ArgumentTypeError(
            f"there is no last.pth in the folder {file}" + (f"; found {others}" if others else "")
        )
    return file / "last.pth"


def list_file(text: str) -> Path:
    """A text file with one name per line."""
    return _no_image(text, "a text file with one name per line")


def folder(text: str) -> Path:
    """A folder of images."""
    return _no_image(text, "a folder")


def _no_image(text: str, expected: str) -> Path:
    """The path, unless its name is the name of an image."""
    file = path(text)
    if file.suffix.lower() in SUFFIXES and not file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is an image where {expected} is expected")
    return file
