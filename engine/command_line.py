"""One command line for all programs: subcommands, the options that they share, the result as JSON.

Slide: none.
Paper: none.
Differs: not in the released code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from engine import processes
from engine.files import write_json
from engine.images import SUFFIXES
from engine.options import Parser, positive, whole
from engine.program import path

FIGURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")  # formats of --output

Command = Callable[[argparse.Namespace], dict]  # options -> the result, which --json writes


class Commands:
    """The subcommands of a program. description: the docstring of its file, shown by --help."""

    def __init__(self, program: str, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        self.parser = Parser(program, description=description, formatter_class=raw)
        self.subparsers = self.parser.add_subparsers(dest="command", required=True)

    def add(
        self, name: str, command: Command, text: str, paths: str = ""
    ) -> argparse.ArgumentParser:
        """A subcommand; text: what it does, one line. Returns its parser, to add options to.

        paths: the name of its positional list of paths, if it has one.
        """
        parser = self.subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        parser.set_defaults(run=command, paths=paths)
        parser.add_argument(
            "--json",
            type=path,
            metavar="FILE",
            help="write the result as JSON; -: to stdout, tables to stderr",
        )
        return parser

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """The options. Raises ValueError with one line."""
        self.subparsers.metavar = " | ".join(self.subparsers.choices)
        args, unknown = self.parser.parse_known_args(argv)
        if args.paths and not any(word.startswith("-") for word in unknown):
            # argparse fills a positional list from one place only: "a --size 9 b c" leaves b and c.
            getattr(args, args.paths).extend(path(word) for word in unknown)
            unknown = []
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"unrecognized arguments: {unknown[0]}{more}")
        return args

    def run(self, argv: list[str] | None) -> int:
        """Calls the subcommand and writes its result: a main for `engine.program.run_program`."""
        args = self.parse(argv)
        to_stdout = args.json == Path("-")
        if args.json and not to_stdout:
            check_writable(args.json, "--json")
        if "device" in args:
            args.device = processes.start(args.device, timeout=600).device
        with contextlib.redirect_stdout(sys.stderr) if to_stdout else contextlib.nullcontext():
            result = dict(command=args.command, **args.run(args))
        if to_stdout:
            print(json.dumps(result, indent=1))
        elif args.json:
            write_json(args.json, result)
        return 0


# --------------------------------------------------------------------------------- shared options


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, --network and --device."""
    parser.add_argument(
        "checkpoint",
        type=checkpoint,
        help="last.pth of a run, the folder of the run, or a released checkpoint; "
        "sizes and k come from it, never from options",
    )
    networks = ("teacher", "student")
    parser.add_argument(
        "--network",
        choices=networks,
        default="teacher",
        help="which of its two networks (default: teacher)",
    )
    # The old name of --network
    parser.add_argument(
        "--which",
        dest="network",
        choices=networks,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="auto: a GPU if there is one (default: auto)",
    )


def add_images(parser: argparse.ArgumentParser, text: str) -> None:
    """--data-dir and how images are read from it; text: what the folder holds."""
    parser.add_argument("--data-dir", type=folder, help=text)
    parser.add_argument(
        "--limit",
        type=whole,
        default=0,
        help="use N images only, evenly spaced, for a quick try; 0: all (default: 0)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        help="images at a time; changes no result (default: 16)",
    )
    parser.add_argument(
        "--workers",
        type=whole,
        default=0,
        help="processes that decode images; 2 to 8 help on a GPU (default: none)",
    )


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """--output; default: the name in words."""
    parser.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help=f"file or folder of the figure (default: {default})",
    )


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


def checkpoint(text: str) -> Path:
    """A checkpoint; of a folder, the last.pth in it."""
    file = no_image(text, "the checkpoint (last.pth, or the folder of a run)")
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
    return no_image(text, "a text file with one name per line")


def folder(text: str) -> Path:
    """A folder of images."""
    return no_image(text, "a folder")


def no_image(text: str, expected: str) -> Path:
    """The path, unless its name is that of an image."""
    file = path(text)
    if file.suffix.lower() in SUFFIXES and not file.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is an image where {expected} is expected")
    return file
