"""A frozen dataclass becomes a command line: one option per field, with its help, its range and its
default.

Slide: none.
Paper: none.
Differs: not in the released code.
Read next: train.py, where the dataclass and its presets stand.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


def option(
    default: Any,
    text: str,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    free: bool = False,
    also: Sequence[str] = (),
) -> Any:
    """A field: help with unit and origin, allowed range; free: a run that is continued may change
    it; also: other spellings of the option, as "--color".
    """
    about = dict(help=text, low=low, high=high, choices=choices, free=free, also=also)
    return dataclasses.field(default=default, metadata=about)


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, raised as ValueError."""

    def error(self, message: str) -> NoReturn:
        """Raises ValueError. Of many words that are no options, as an unquoted * makes of one, only
        the first is named.
        """
        kind, _, words = message.partition("unrecognized arguments: ")
        if not kind and len(words.split()) > 4:
            message = (
                f"unrecognized arguments: {words.split()[0]} and {len(words.split()) - 1} "
                "more; give the folder, or put a pattern into quotes"
            )
        raise ValueError(message)


def parse(presets: Mapping[str, T], argv: list[str] | None, description: str) -> tuple[T, set[str]]:
    """The command line -> the preset it names, with the given options replaced; and the names of
    those given.

    presets: name -> instance of one dataclass with a field `preset`; the first is the default.
    Raises ValueError with one line for an unknown option, preset or choice, and for a number out of
    range.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser, presets)
    return settle(presets, parser.parse_args(argv))


def add_options(
    parser: argparse.ArgumentParser, presets: Mapping[str, Any], by: str = "preset"
) -> None:
    """One option per field of the presets' dataclass. by: the field that names a preset."""
    first = next(iter(presets.values()))
    types = typing.get_type_hints(type(first))
    for f in dataclasses.fields(first):
        arguments: dict[str, Any] = dict(default=argparse.SUPPRESS)
        arguments["help"] = f"{f.metadata['help']}{defaults(presets, f, by)}".replace("%", "%%")
        if types[f.name] in (bool, bool | None):
            arguments["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(types[f.name]) is tuple:
            kind, *others = typing.get_args(types[f.name])
            arguments.update(type=kind, nargs=1 + len(others), metavar="NUMBER")
        else:
            choices = tuple(presets) if f.name == by else f.metadata["choices"]
            arguments.update(type=types[f.name], choices=choices)
        parser.add_argument(flag(f.name), *f.metadata["also"], dest=f.name, **arguments)


def settle(
    presets: Mapping[str, T], args: argparse.Namespace, by: str = "preset"
) -> tuple[T, set[str]]:
    """What was given on the command line, over the preset it names; and the names of what was
    given. Raises ValueError for a number out of range.
    """
    first = next(iter(presets))
    names = {f.name for f in dataclasses.fields(presets[first])}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in names}
    settings = dataclasses.replace(presets[given.get(by, first)], **given)
    check_ranges(settings)
    return settings, set(given)


def defaults(presets: Mapping[str, Any], f: dataclasses.Field, by: str = "preset") -> str:
    """The value of a field without its option: one where the presets agree, else that of each."""
    values = {name: getattr(preset, f.name) for name, preset in presets.items()}
    if f.name == by:
        return f" (default: {next(iter(presets))})"
    if len(set(values.values())) == 1:
        value = next(iter(values.values()))
        return "" if value in ("", None) else f" (default: {value})"
    usual = max(values.values(), key=list(values.values()).count)
    others = ", ".join(f"{name}: {value}" for name, value in values.items() if value != usual)
    return f" (default: {usual}; {others})"


def check_ranges(settings: Any) -> None:
    """Every number in its range, every choice among the choices. Raises ValueError for the first
    that is not.
    """
    for f in dataclasses.fields(settings):
        value, low, high, choices = (
            getattr(settings, f.name),
            *(f.metadata[k] for k in ("low", "high", "choices")),
        )
        if choices and value not in choices:
            raise ValueError(f"{flag(f.name)} {value}: choose one of {', '.join(choices)}")
        for number in value if isinstance(value, tuple) else (value,):
            # `not >=` rather than `<`, so that nan is out of range too
            if (low is not None and not number >= low) or (high is not None and not number <= high):
                raise ValueError(
                    f"{flag(f.name)} {number} is out of range: expected {low} to {high}"
                )


def differences(settings: Any, earlier: Mapping[str, Any]) -> list[str]:
    """What differs in the options that are not free, as "name: EARLIER then, NOW now".

    A field that the earlier settings did not know counts as its default.
    """
    found = []
    for f in dataclasses.fields(settings):
        now, then = getattr(settings, f.name), earlier.get(f.name, f.default)
        if not f.metadata["free"] and as_list(now) != as_list(then):
            found.append(f"{f.name}: {then} then, {now} now")
    return found


def as_list(value: Any) -> Any:
    """Tuples come back from JSON as lists."""
    return list(value) if isinstance(value, tuple) else value


def whole(text: str) -> int:
    """A number from 0 on. argparse reports the ValueError of a type as one line."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def positive(text: str) -> int:
    """A number from 1 on, as `whole`."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def side(text: str) -> int:
    """The type of --size, px: from 32 on, as --image-size of train.py.

    Below that the reflect padding of a trunk can be wider than its map.
    """
    if int(text) < 32:
        raise argparse.ArgumentTypeError(f"{text} px are too few: it takes at least 32")
    return int(text)


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")
