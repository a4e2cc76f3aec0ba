"""Imported first by every program: Ctrl-C during the other imports is one line too.

Slide: none.
Paper: none.
Differs: not in the released code.

It also lets idle threads sleep. They spin by default, and two runs on one machine then slow each
other down many times. The setting counts only before torch is loaded.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    if os.environ.get("RANK", "0") == "0":  # a terminal interrupts all processes
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


sys.excepthook = _hook
