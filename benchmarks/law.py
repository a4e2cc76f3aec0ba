"""Does the law say beforehand which toy runs start? Ten short runs over temperatures and views.

    python benchmarks/law.py                    240 steps each, about ten minutes on one core

For each: what train.py prints about the law after its first 256 images (measures/learning.py:
rho, the correlation of features between the views, against temp_teacher / temp_student), and what
was seen: the group loss left 2 ln k if its mean over the last quarter of the log lies below LEFT of
it. A run starts from 0.8 of the ratio on, since its backbone learns meanwhile [U].
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT = 0.95  # of 2 ln k: a group loss below has left the uniform assignment by a clear margin
RIPENING = 0.8  # of the ratio suffices for a run
K = 16
# All that the law depends on is written out, so that another preset does not change the table.
COMMON = (
    f"--preset toy --arch tiny --subset 768 --image-size 48 --num-prototypes {K} "
    "--temp-student 0.1 --momentum-center 0.9 --momentum-teacher 0.99 0.99 --batch-size 16 "
    "--base-lr 0.16 --epochs 36 --warmup 0.625 --device cpu --workers 0 "
    "--log-every 20"
)
TOY = "--min-area 0.2 --jitter 0.2 0.2 0.3 0.5 1 --p-gray 0.2 --p-blur 0 0 --solarize 0.5 0.5 0"
PUBLISHED = "--min-area 0.08 --jitter 0.4 0.4 0.2 0.1 0.8 --p-blur 1 0.1 --solarize 0 0.2 128"
VIEWS = {  # of an option that is given twice, the last counts
    "toy": "",
    "not inverted": "--solarize 0 0 0",
    "mild": "--solarize 0 0 0 --p-gray 0 --jitter 0.1 0.1 0.1 0.05 1",
    "strong": "--jitter 0.5 0.5 0.5 0.5 1",
    "published": PUBLISHED,
}
RUNS = (  # views, teacher temperature; the student's is 0.1
    *(("toy", t) for t in (0.02, 0.03, 0.05, 0.07)),
    ("not inverted", 0.05),
    ("mild", 0.05),
    ("mild", 0.09),
    ("strong", 0.03),
    ("published", 0.03),
    ("published", 0.07),
)


def one_run(views: str, temp_teacher: float, seed: int, steps: int) -> dict[str, float]:
    """What a run says about the law, and what it did."""
    options = f"{COMMON} {TOY} {VIEWS[views]} --temp-teacher {temp_teacher} --seed {seed}".split()
    with tempfile.TemporaryDirectory() as folder:
        ending = ["--max-steps", str(steps), "--output-dir", folder]
        command = [sys.executable, "train.py", *options, *ending]
        out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["group_loss"] for line in lines]
    last = statistics.mean(losses[-math.ceil(len(losses) / 4) :]) / (2 * math.log(K))
    rho = float(re.search(r"views correlate (-?[\d.]+)", out.stdout)[1])
    return dict(rho=rho, ratio=temp_teacher / 0.1, share_of_2_ln_k=last)


def main() -> None:
    """All runs, a row each, and how often the law was right."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=len(RUNS), help="the first N runs only")
    args = parser.parse_args()
    print("| views | temp_teacher | rho | ratio | predicted | seen | group loss / 2 ln k |")
    print("|---" * 7 + "|")
    right, words = 0, {True: "starts", False: "uniform"}
    for views, temp_teacher in RUNS[: args.only]:
        r = one_run(views, temp_teacher, args.seed, args.steps)
        predicted, seen = r["rho"] > RIPENING * r["ratio"], r["share_of_2_ln_k"] < LEFT
        right += predicted == seen
        print(
            f"| {views} | {temp_teacher:g} | {r['rho']:.2f} | {r['ratio']:.2f} | "
            f"{words[predicted]} | {words[seen]} | {r['share_of_2_ln_k']:.3f} |",
            flush=True,
        )
    print(f"\nThe law was right in {right} of {args.only} runs.")


if __name__ == "__main__":
    main()
