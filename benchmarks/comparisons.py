"""The tables of comparisons.md from a comparison.json of compare.py.

    python benchmarks/comparisons.py runs/compare/comparison.json

A difference between two rows exceeds the spread where the worst seed of one is better than the best
seed of the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

Rows = Mapping[str, Sequence[dict]]  # label -> records, one per seed

MEASURES = {
    "miou": "mIoU",
    "nmi": "NMI",
    "probe_miou": "probe mIoU",
    "ari_objects": "ARI objects",
    "ari_instances": "ARI instances",
    "ari_foreground": "ARI foreground",
}


def line(*cells: str) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> str:
    """The first two lines."""
    return f"{line(*cells)}\n{'|---' * len(cells)}|"


def cell(values: Sequence[float]) -> str:
    """Median (least .. most)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def main_table(rows: Rows) -> str:
    """All measures; a star where k-means on the backbone's features stands in for groups."""
    lines = [head("row", *MEASURES.values(), "groups in use")]
    for label, records in rows.items():
        cells = []
        for key in MEASURES:
            how = records[0]["named_by" if key in ("miou", "nmi") else "grouped_by"]
            star = "*" if key != "probe_miou" and "k-means" in how else ""
            cells.append(cell([record[key] for record in records]) + star)
        used = f"{statistics.median(record['groups_used'] for record in records):g}"
        gone = sum(record["collapsed"] for record in records)
        lines.append(line(label, *cells, used + f", {gone} collapsed" * bool(gone)))
    return "\n".join(lines)


def untrained_table(rows: Rows) -> str:
    """The same before training; rows with equal numbers are one."""
    alike: dict[str, list[str]] = {}
    for label, records in rows.items():
        cells = [cell([record["untrained"][key] for record in records]) for key in MEASURES]
        alike.setdefault(" | ".join(cells), []).append(label)
    lines = [line(", ".join(labels), cells) for cells, labels in alike.items()]
    return "\n".join([head("before training", *MEASURES.values()), *lines])


def beyond_the_spread(rows: Rows, reference: str) -> str:
    """Which rows every seed puts below or above the reference."""
    sides = (f"clearly below {reference}", "within the spread", f"clearly above {reference}")
    lines = [head("measure", *sides)]
    for key, name in MEASURES.items():
        found = {label: [record[key] for record in records] for label, records in rows.items()}
        ours = found.pop(reference)
        below = [label for label, values in found.items() if max(values) < min(ours)]
        above = [label for label, values in found.items() if min(values) > max(ours)]
        within = [label for label in found if label not in (*below, *above)]
        lines.append(line(name, *(", ".join(side) or "none" for side in (below, within, above))))
    return "\n".join(lines)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file", type=Path)
    parser.add_argument("reference", nargs="?", help="the row to compare with (slotcon)")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file}: no such file: `python compare.py` writes it")
    found = json.loads(args.file.read_text())
    rows, minutes = found["rows"], found["seconds"] / 60
    reference = "slotcon" if "slotcon" in rows else next(iter(rows))
    print(f"{found['seeds']} seed(s), {found['steps']} steps, {minutes:.0f} min, k = {found['k']}")
    print("", main_table(rows), "", untrained_table(rows), sep="\n")
    print("", beyond_the_spread(rows, args.reference or reference), sep="\n")
