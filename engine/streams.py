"""Output that cannot be written costs lines, not the run: a closed pipe, a full disk. A character
that the terminal does not know costs nothing but its looks.

Slide: none.
Paper: none.
Differs: not in the released code.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class Unbreakable:
    """A stream whose writes never fail: after a failure everything goes to the null device.

    What the encoding of the stream lacks is written as Python writes it, \\u043c for a Cyrillic m.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, and flush at the end of a line."""
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # a ValueError too, but of this text, not of the stream
                encoding = self.stream.encoding
                self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            if "\n" in text:
                self.stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.silence()
        return len(text)

    def flush(self) -> None:
        """Flush."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self) -> None:
        """Point the file descriptor to the null device: what is still buffered goes there too."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def make_unbreakable() -> contextlib.ExitStack:
    """stdout and stderr of this process, until the returned stack is closed."""
    stack = contextlib.ExitStack()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, Unbreakable):
            continue
        setattr(sys, name, Unbreakable(stream))
        stack.callback(setattr, sys, name, stream)
        stack.callback(getattr(sys, name).flush)
    return stack
