"""What a program says while it runs: lines on stderr, and how far it is."""

import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TextIO, TypeVar

from tqdm import tqdm

from engine.ranks import rank_and_world_size

T = TypeVar("T")
OFTEN = 15  # seconds between two lines of `progress` [U]


def say(line: str) -> None:
    """A line on stderr, above the bar."""
    tqdm.write(fit(line, sys.stderr), file=sys.stderr)


def fit(text: str, stream: TextIO) -> str:
    """The text; lines that are wider than the terminal are broken between words."""
    if not stream.isatty():
        return text
    form = dict(subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
    known = os.environ.get("COLUMNS", "")
    width = int(known) if known.isdecimal() else os.get_terminal_size(stream.fileno()).columns
    return "\n".join(textwrap.fill(line, width or 80, **form) for line in text.split("\n"))


def progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The items, below a bar on stderr; where that is no terminal, with a line now and then.

    Of several processes the main one says it.
    """
    silent = rank_and_world_size()[0] > 0
    began = said = time.perf_counter()
    with tqdm(total=total, desc=title, disable=silent or None, leave=False) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update()
            now = time.perf_counter()
            if bar.disable and not silent and now > said + OFTEN:
                left, said = timedelta(seconds=round((now - began) / done * (total - done))), now
                say(f"{title}: {done} of {total}, {left} left")
