"""train.py --plan and engine/plan.py: what a run would need.

Promised: what is counted is what gloo really moves, with 2 and 4 processes, to 5 %; no file is
written; no image is needed; a refusal in one line for options that do not go together.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import planning
import recipes
import train
from engine import plan
from engine.images import Photograph
from engine.plan import Cost, DrawnPhotographs, Norms, Plan, Traffic, traffic
from staged import ROOT, draw_photographs

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- what is counted


def test_the_bytes_of_a_step_of_four_processes_as_on_paper():
    found = traffic(
        4, weights=100, norms=[(8, True), (8, False)], rows=10, dim=5, prototypes=6, parts=2
    )
    assert found.gradient == 1.5 * 400
    assert found.norms == 2 * 3 * 17 * 4 + 1.5 * 16 * 4
    assert found.keys == 3 * 10 * 5 * 4
    assert found.votes == 2 * (1.5 * 24 + 2 * 1.5 * 8 + 3 * 32) + 1.5 * 24
    assert found.total == sum(found)


def test_a_process_on_its_own_sends_nothing_and_without_a_slot_loss_no_counts_are_gathered():
    assert traffic(1, 100, [(8, True)], 10, 5, 6).total == 0
    with_slots, without = (traffic(2, 100, [], 0, 5, 6, contrasted=c).votes for c in (True, False))
    assert with_slots - without == 32


def test_the_norms_that_run_are_counted_with_whether_a_backward_follows():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))
    with Norms(model) as found:
        model(torch.zeros(2, 3, 4, 4))
        with torch.no_grad():
            model(torch.zeros(2, 3, 4, 4))
    model(torch.zeros(2, 3, 4, 4))
    assert found == [(5, True)] * 2 + [(5, False)] * 2


def test_large_batches_of_a_cpu_are_concluded_from_small_ones():
    assert plan.sizes_to_measure(8, 224, CPU) == [8]
    assert plan.sizes_to_measure(64, 224, CPU) == [4, 8]
    assert plan.sizes_to_measure(64, 48, CPU) == [64]
    assert plan.sizes_to_measure(64, 4096, CPU) == [2, 4]
    assert plan.sizes_to_measure(64, 224, torch.device("cuda")) == [64]


def test_a_line_leads_from_two_sizes_to_a_third(monkeypatch):
    now = [0.0]

    def step_of(size):
        def step():
            now[0] += 10 + 2 * size

        return step

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    saved = []
    cost = plan.cost_of(64, [4, 8], step_of, CPU, lambda: saved.append("state"))
    assert saved == ["state"] * 2  # a run has a checkpoint in memory when it writes one
    assert cost.seconds == pytest.approx(10 + 2 * 64) and "4 and 8 images" in cost.how
    assert plan.cost_of(8, [8], step_of, CPU)[::2] == (26, "measured")


def plan_with(**changes):
    values = dict(
        processes=2, steps=100, batch_size=8, parts=2, device="cpu",
        cost=Cost(3.0, 1.5, "measured"), traffic=Traffic(4e6, 3e6, 2e6, 1e6), most_keys=9e6,
        gradient_bytes=8_000_000, synchronized=False, checkpoint_bytes=5_000_000, checkpoints=3,
        reading=0.5, workers=1,
    )  # fmt: skip
    return Plan(**{**values, **changes})


def test_the_lines_of_a_plan_by_hand():
    text = "\n".join(plan_with().lines())
    assert "100 of 8 images, 4 on each of 2 process(es) (counted)" in text
    assert "step     6 s, 1.333 images/s on cpu (measured, random images, without the wire)" in text
    assert "hours    0.1667" in text and "1.5 GB per process (measured), and 8.0 MB more" in text
    assert "wire     7.0 MB sent" in text  # on a CPU the norms send nothing
    assert "batch norms 3.0 MB on GPUs, nothing on a CPU, keys 2.0 MB" in text
    assert "5.0 MB a checkpoint, 15.0 MB in all" in text
    assert "500 ms of a core per image (measured): 1 worker(s) per process keep up" in text
    assert "wire     10.0 MB sent" in "\n".join(plan_with(synchronized=True).lines())


def test_a_step_waits_for_slow_readers():
    slow = plan_with(reading=4.0)
    assert slow.seconds_per_step() == 16 and "it waits for the images" in slow.lines()[1]
    assert "3 worker(s) per process keep up, 1 are asked for" in slow.lines()[-1]
    assert plan_with(reading=4.0, workers=3).seconds_per_step() == 6
    assert plan_with(reading=0.5, workers=0).seconds_per_step() == 8  # one after the other


def test_a_drawn_photograph_stands_for_those_that_are_not_here():
    images = DrawnPhotographs(11)
    assert len(images) == 11 and isinstance(images[10], Photograph)
    assert images[3].shape == (3, 480, 640) and 30_000 < len(images.content) < 300_000
    assert images[3].pixels(2).factor == 2


# --------------------------------------------------------------------------------- the program

TINY = "--arch tiny --image-size 32 --num-prototypes 5 --dim-hidden 12 --dim-out 7 --batch-size 4"


def test_a_plan_needs_no_images_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = f"--preset coco-r50 --plan --plan-processes 2 --device cpu --threads 1 {TINY}".split()
    assert train.main([*argv, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "118287 images" in out and "steps    23656800 of 4 images, 2 on each of 2" in out
    assert all(f"\n{word:9}" in out for word in ("step", "hours", "memory", "wire", "disk"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--plan-processes 2", "--plan-processes says what --plan plans for: add --plan"),
        ("--plan-images 9", "--plan-images says what --plan plans for: add --plan"),
        ("--plan --check-data", "give one of them"),
        ("--plan --plan-images 99", "the images of this run are counted: leave it out"),
        ("--plan --preset photos", "needs the number of images: --plan-images N, or --data-dir"),
        ("--plan --preset coco-r50 --plan-processes 3", "--batch-size 512 must be divisible by 3"),
        ("--plan --preset photos --plan-images 9", "larger than the data set of 9 images"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(arguments, words, capsys):
    assert train.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_one_process_plans_for_all(monkeypatch):
    c, _ = recipes.parse(["--plan"], "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--plan-processes N says how many a run has"):
        planning.plan(c, train.take_step)


def test_the_number_of_images_is_that_of_the_table():
    c, _ = recipes.parse("--preset imagenet-r50-100ep --plan --subset 5000".split(), "")
    assert len(recipes.images_of(c)[0]) == 5000
    c, _ = recipes.parse("--preset photos --plan --plan-images 500".split(), "")
    assert len(recipes.images_of(c)[0]) == 500 - 50


# ------------------------------------------------------------------------------------ slow

SENDER = """
import json, os, socket, stat, struct, sys
import torch, torch.distributed as dist
import planning, recipes, train
from engine.run import Run

def sent():
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
        except OSError:
            pass
    return total

kinds = {}
def watched(name):
    real = getattr(dist, name)
    def call(first, *rest):
        piece = first if name == "all_reduce" else rest[0]
        key = "keys" if name == "all_gather" and piece.is_floating_point() else "votes"
        n = dist.get_world_size()
        times = 2 * (n - 1) / n if name == "all_reduce" else n - 1
        kinds[key] = kinds.get(key, 0) + times * piece.numel() * piece.element_size()
        return real(first, *rest)
    setattr(dist, name, call)

c, given = recipes.parse(sys.argv[2:], "")
run = train.set_up(c, given)
device = run.place.device
batch = planning.random_batch(c, c.batch_size // run.place.world_size)
photometric = recipes.photometric_of(c)
generator = torch.Generator().manual_seed(run.place.rank)
def step():
    views = photometric(batch.views, generator)
    train.take_step(c, run, views, batch.boxes, batch.flipped)
for _ in range(2):
    step()
dist.barrier()
watched("all_reduce"), watched("all_gather")
before = sent()
for _ in range(4):
    step()
torch.cuda.synchronize() if device.type == "cuda" else None
dist.barrier()
found = dict(total=(sent() - before) / 4, **{key: value / 4 for key, value in kinds.items()})
with open(f"{sys.argv[1]}.{run.place.rank}", "w") as out:
    json.dump(found, out)
run.close()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_bytes_are_those_that_gloo_moves(tmp_path, count):
    photographs = draw_photographs(tmp_path / "images", 40)
    sizes = "--arch small --image-size 64 --num-prototypes 24 --dim-hidden 128 --dim-out 64"
    common = ["--preset", "coco-r50", "--device", "cpu", "--threads", "1", "--workers", "0"]
    common += [*sizes.split(), "--batch-size", "16", "--data-dir", str(photographs)]
    common += ["--dataset", "folder"]
    (tmp_path / "sender.py").write_text(SENDER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, f"--nproc-per-node={count}", str(tmp_path / "sender.py"), str(tmp_path / "out"),
         *common, "--output-dir", str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=280,
    )  # fmt: skip
    sent = [json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(count)]
    c, _ = recipes.parse([*common, "--plan", "--plan-processes", str(count)], "")
    planned = planning.plan(c, train.take_step).traffic
    total = sum(one["total"] for one in sent) / count
    assert planned._replace(norms=0).total == pytest.approx(total, rel=0.05)
    assert planned.votes == pytest.approx(sent[0]["votes"])
    assert planned.keys == pytest.approx(sent[0]["keys"], rel=0.25)  # other weights, other noise


@pytest.mark.slow
def test_a_checkpoint_has_the_size_that_was_planned(tmp_path):
    argv = [*TINY.split(), "--device", "cpu", "--threads", "1", "--workers", "0"]
    argv += ["--dim-hidden", "512"]
    assert train.main([*argv, "--max-steps", "2", "--output-dir", str(tmp_path)]) == 0
    planned = planning.plan(recipes.parse([*argv, "--plan"], "")[0], train.take_step)
    size = (tmp_path / "last.pth").stat().st_size
    assert planned.checkpoint_bytes == pytest.approx(size, rel=0.05)
