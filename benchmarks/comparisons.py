"""The tables of comparisons.md from a comparison.json of compare.py.

    python benchmarks/comparisons.py runs/compare/comparison.json

A difference between two rows exceeds the spread where the worst seed of one is better than the best
seed of the other.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

MEASURES = {
    "miou": "mIoU",
    "nmi": "NMI",
    "probe_miou": "probe mIoU",
    "ari_instances": "ARI instances",
    "ari_objects": "ARI objects",
    "ari_classes": "ARI classes",
}


def rows_of(found: dict) -> dict[str, list[dict]]:
    """label -> records, one per seed."""
    rows: dict[str, list[dict]] = {}
    for name, records in found["systems"].items():
        for record in records:
            variant = "" if found["table"] else record["variant"]
            rows.setdefault(f"{name}: {variant}" if variant else name, []).append(record)
    return rows


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def main_table(rows: dict[str, list[dict]]) -> str:
    lines = [
        "| row | " + " | ".join(MEASURES.values()) + " | groups used | steps | collapsed |",
        "|---" * (len(MEASURES) + 4) + "|",
    ]
    for label, records in rows.items():
        cells = []
        for key in MEASURES:
            how = "named_by" if key in ("miou", "nmi") else "grouped_by"
            star = "*" if key != "probe_miou" and "k-means" in records[0][how] else ""
            cells.append(cell([record[key] for record in records]) + star)
        used = statistics.median(record["groups_used"] for record in records)
        steps = statistics.median(record["steps"] for record in records)
        gone = sum(record["collapsed"] for record in records)
        lines.append(
            f"| {label} | {' | '.join(cells)} | {used:g} | {steps:g} | {gone} of {len(records)} |"
        )
    return "\n".join(lines)


def untrained_table(rows: dict[str, list[dict]]) -> str:
    lines = [
        "| before training | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    seen = {}
    for label, records in rows.items():
        cells = [cell([record["untrained"][key] for record in records]) for key in MEASURES]
        seen.setdefault(" | ".join(cells), []).append(label)
    lines += [f"| {', '.join(labels)} | {cells} |" for cells, labels in seen.items()]
    return "\n".join(lines)


def beyond_the_spread(rows: dict[str, list[dict]], reference: str) -> str:
    lines = [
        f"| measure | clearly below {reference} | within the spread | clearly above {reference} |",
        "|---|---|---|---|",
    ]
    for key, title in MEASURES.items():
        ours = [record[key] for record in rows[reference]]
        sides: dict[str, list[str]] = {"below": [], "within": [], "above": []}
        for label, records in rows.items():
            values = [record[key] for record in records]
            side = (
                "below"
                if max(values) < min(ours)
                else "above"
                if min(values) > max(ours)
                else "within"
            )
            if label != reference:
                sides[side].append(label)
        lines.append(
            f"| {title} | "
            + " | ".join(", ".join(side) or "none" for side in sides.values())
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    rows = rows_of(found)
    print(
        f"{found['seeds']} seed(s), {found['training_seconds_each']:.0f} s of training each, "
        f"{found['seconds'] / 60:.0f} minutes in all, k = {found['k']}\n"
    )
    print(main_table(rows), "", untrained_table(rows), sep="\n")
    reference = "slotcon" if "slotcon" in rows else next(iter(rows))
    print("", beyond_the_spread(rows, sys.argv[2] if len(sys.argv) > 2 else reference), sep="\n")
