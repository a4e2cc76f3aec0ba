"""Two processes with half a batch each are one process with the whole batch.

Batch norms are in evaluation mode, where they are not ours.
"""

import math
import os
import zlib

import pytest
import torch
import torch.distributed as dist

from engine import processes, ranks
from engine.norms import SummedNorm, SyncedNorm, converted
from engine.optimizers import LARS
from engine.processes import Place
from engine.run import Options, Run
from measures.learning import statistics
from slotcon import SlotCon
from slots import SlotPredictor
from staged import At, of_each_rank, play
from trained import random

K, D, HIDDEN, H, W = 6, 7, 9, 4, 5
B = 4  # images per process
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def build(settings, alike):
    """A small SlotCon; alike: the teacher is the student but for the order of its prototypes."""
    model = SlotCon("tiny", K, HIDDEN, D, **settings).double()
    for name, p in model.named_parameters():
        noise = random(*p.shape, seed=zlib.crc32(name.encode()))
        scaled = noise * math.sqrt(3 / p[0].numel()) if p.ndim > 1 else noise / 9
        p.data = scaled + (p.ndim == 1 and name.endswith("weight"))
    if alike:
        model.teacher.load_state_dict(model.student.state_dict())
        model.teacher.prototypes.weight.data = model.teacher.prototypes.weight.roll(1, 0)
    model.center.copy_(random(K, seed=99) / 9)
    return model.eval()


def joined_batch(valid, flat):
    """2 B images; valid: whose crops overlap; flat: which show one color, the same."""
    views, flipped = random(2 * B, 2, 3, 4 * H, 4 * W, seed=7), random(2 * B, 2, seed=8) > 0
    low, high = (random(2 * B, 2, 2, seed=seed).sigmoid() * 0.4 for seed in (9, 10))
    boxes = torch.cat([low, 1 - high], dim=2)
    boxes[~torch.tensor(valid)] = 0
    views[flat] = 0.5
    return views, boxes, flipped


ALL, NONE, FIRST = [True] * 2 * B, [False] * 2 * B, [True] * B + [False] * B
SOME = [True, False, True, True, False, False, True, False]
NOISE, SECOND_FLAT, ALL_FLAT = [], list(range(B, 2 * B)), list(range(2 * B))
# name -> settings of SlotCon, images whose crops overlap, images of one color
CASES = {
    "method": ({}, SOME, NOISE),
    "reg": (dict(slot_loss="reg"), SOME, NOISE),
    "proj": (dict(align="proj"), SOME, NOISE),
    "image": (dict(image_loss=True), SOME, NOISE),
    "group only": (dict(group_weight=1.0), SOME, NOISE),
    "no overlap in one process": ({}, FIRST, NOISE),
    "no overlap anywhere": ({}, NONE, NOISE),
    "no query in one process": ({}, ALL, SECOND_FLAT),
    "no query in one process, reg": (dict(slot_loss="reg"), ALL, SECOND_FLAT),
    "no query anywhere": ({}, ALL, ALL_FLAT),
}
# Without a query anywhere all is of one color: with no variance rounding decides
TRAINED = ("method", "image", "no overlap anywhere", "no query in one process")
# Rows of each of four processes: of two, the first half and the second
ROWS = [(4, 4, 4, 4), (0, 0, 9, 0), (0, 9, 0, 0), (8, 0, 1, 0), (1, 1, 0, 1)]
HALF = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of numbers up to about 4
VOTES = {  # name -> values of two ranks, and who was asked to stop, who is in trouble
    "finite": ([[1.0, 3.0], [2.0, 5.0]], (), ()),
    "nan on one": ([[1.0, 3.0], [NAN, 5.0]], (), ()),
    "inf against -inf": ([[INF, 1.0], [-INF, 1.0]], (), ()),
    "stop on one": ([[1.0, 3.0], [2.0, 5.0]], (1,), ()),
    "trouble on one": ([[1.0, 3.0], [2.0, 5.0]], (), (0,)),
    "all at once": ([[NAN, 3.0], [2.0, 5.0]], (0,), (1,)),
}


def run_of(model, place, accumulate=1):
    trained = [p for p in model.parameters() if p.requires_grad]
    options = Options("", B * place.world_size, 1, accumulate=accumulate, workers=0)
    given = list(range(2 * B)), lambda image, rng: torch.tensor(image), {}
    return Run(options, place, model, LARS(trained, 0.3), *given, names=("loss", "group", "slot"))


def step(model, place, batch, passes=1):
    """One step as train.py takes it; everything that comes out of it."""
    run, reports, synced = run_of(model, place, passes), [], []
    for part in run.parts(*batch):
        synced.append(getattr(run.network, "require_backward_grad_sync", None))
        loss, report = run.network(*part)
        run.backward(loss)
        reports.append(report)
    assert run.agree(torch.stack([report.losses for report in reports]).mean(dim=0))
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    run.step(0.3)
    model.update_center(torch.stack([r.center_mean for r in reports]).mean(dim=0), 0.9)
    model.update_teacher(0.9)
    return dict(
        values=run.values,
        own=report.losses,
        gradients=named,
        state=model.state_dict(),
        statistics=statistics(report, model.center, 0.07),
        synced=synced,
    )


def synced(settings, alike, place):
    """In training mode, with norms of ours; in one process they are torch's."""
    return processes.synchronized(build(settings, alike).train(), place, "ours")


def of_rank(batch, rank):
    return [x[rank * B : (rank + 1) * B] for x in batch]


def vote(rank, place, values, stop, trouble):
    """What a rank knows after the ranks agreed."""
    run = run_of(SlotCon("tiny", K, HIDDEN, D), place)
    run.signals.received = "SIGTERM" if rank in stop else ""
    run.trouble = "gone" if rank in trouble else ""
    return run.agree(torch.tensor(values[rank])), run.ended, run.values[:2]


def one_of_two(rank):
    place, found = Place(CPU, rank, 2), {}
    for name, (settings, valid, flat) in CASES.items():
        batch = of_rank(joined_batch(valid, flat), rank)
        found[name] = step(build(settings, alike=bool(flat)), place, batch)
    batch = of_rank(joined_batch(SOME, NOISE), rank)
    found["accumulated"] = step(build({}, alike=False), place, batch, passes=2)
    for name in TRAINED:
        settings, valid, flat = CASES[name]
        batch = of_rank(joined_batch(valid, flat), rank)
        found[f"{name}, training"] = step(synced(settings, bool(flat), place), place, batch)
    batch = of_rank(joined_batch(ALL, SECOND_FLAT), rank)  # batch norms that know their own rows
    found["training"] = step(build({}, alike=True).train(), place, batch)
    found["votes"] = {name: vote(rank, place, *case) for name, case in VOTES.items()}
    found["sum"] = [ranks.sum_over_ranks(own := torch.tensor([1.0, 10.0]) + rank), own]
    return found


def run_norm(norm, rows, gradient):
    """What comes out of a norm and goes back through it, and its running statistics."""
    rows = rows.clone().requires_grad_()
    out = norm(rows)
    out.backward(gradient)
    return dict(out=out.detach(), back=rows.grad, **{
        name: (p.grad if p.requires_grad else p).clone()
        for name, p in [*norm.named_parameters(), *norm.named_buffers()]
    })  # fmt: skip


def norm_and_rows(dtype, counts):
    """A batch norm with weights, its rows, and their gradients: maps or vectors."""
    n, maps = sum(counts), counts == ROWS[0]
    norm = (torch.nn.BatchNorm2d if maps else torch.nn.BatchNorm1d)(D, dtype=torch.float64)
    norm.weight.data, norm.bias.data = random(D, seed=1), random(D, seed=2)
    shape = (n, D, H, W) if maps else (n, D)
    return norm, (random(*shape) * 2 + 3).to(dtype), random(*shape, seed=3).to(dtype)


def norms_of_one(rank):
    """Ours, on this process's part of the rows."""
    found, share = {}, len(ROWS[0]) // dist.get_world_size()
    for dtype in (torch.float64, *HALF):
        for counts in ROWS:
            norm, rows, gradients = norm_and_rows(dtype, counts)
            part = slice(sum(counts[: rank * share]), sum(counts[: (rank + 1) * share]))
            norm = converted(norm if dtype == torch.float64 else norm.float(), SummedNorm)
            found[dtype, counts] = run_norm(norm, rows[part], gradients[part])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return of_each_rank(one_of_two, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=[2, 4])
def normed(request, tmp_path_factory):
    return of_each_rank(norms_of_one, tmp_path_factory.mktemp("norms"), request.param)


def same(a, b):
    """Equal to what float64 leaves; gradients that are zero up to rounding compare absolutely."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-8, atol=1e-13), name


@pytest.mark.parametrize("case, training", [
    *((case, "") for case in CASES), *((case, ", training") for case in TRAINED),
])  # fmt: skip
def test_two_processes_with_half_a_batch_each_are_one_with_the_whole_batch(found, case, training):
    """In training with norms of ours."""
    settings, valid, flat = CASES[case]
    model = synced(settings, bool(flat), Place(CPU)) if training else build(settings, bool(flat))
    whole = step(model, Place(CPU), joined_batch(valid, flat))
    for half in (rank[case + training] for rank in found):
        assert half["values"] == pytest.approx(whole["values"], rel=1e-9)  # the norm, too
        same(half["gradients"], whole["gradients"])
        same(half["state"], whole["state"])  # center, teacher and running statistics among it
        assert half["statistics"] == pytest.approx(whole["statistics"], rel=1e-6)  # in float32


@pytest.mark.parametrize("counts", ROWS, ids=str)
def test_norms_over_ranks_are_those_of_the_whole_batch_whoever_has_the_rows(normed, counts):
    """To 1e-12 in float64; in half precision to what half precision leaves."""
    for dtype, limit in {torch.float64: 1e-12, **HALF}.items():
        norm, rows, gradients = norm_and_rows(dtype, counts)
        whole = run_norm(norm, rows.double(), gradients.double())
        parts = [rank[dtype, counts] for rank in normed]
        for name in ("out", "back"):
            joined = torch.cat([part[name] for part in parts])
            assert joined.dtype == dtype
            assert (joined - whole[name]).abs().max() < limit, (dtype, name)
        for name in ("weight", "bias"):
            assert (sum(part[name] for part in parts) - whole[name]).abs().max() < 10 * limit
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            for part in parts:
                assert (part[name] - whole[name]).abs().max() < max(limit**2, 1e-12)


def test_a_variance_beside_a_large_mean_keeps_its_digits_in_float32():
    norm = converted(torch.nn.BatchNorm2d(D), SummedNorm)
    maps = random(64, D, 14, 14).float() + 10
    norm(maps)
    expected = 0.9 + 0.1 * maps.double().var((0, 2, 3))
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=3e-6, atol=0)


def test_a_process_without_queries_gives_torchs_norms_float32_in_half_precision(monkeypatch):
    """They send zeros of that type, all others float32; unlike types end gloo and stop NCCL."""
    seen = []
    norm = lambda self, x: seen.append(x.dtype) or self.weight * x + self.bias
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "forward", norm)
    predictor = converted(SlotPredictor(D, D, HIDDEN), SyncedNorm)
    with torch.autocast("cpu", torch.bfloat16):
        predictor(random(0, D).float()).sum().backward()
    assert seen == [torch.float32] * 2 and all(p.grad.eq(0).all() for p in predictor.parameters())


def test_of_several_passes_the_gradient_is_the_mean_over_passes_and_processes(found):
    """A pass is what both processes see at once; only the last one exchanges gradients."""
    model, batch = build({}, alike=False), joined_batch(SOME, NOISE)
    together = torch.tensor([[0, 1, B, B + 1], [2, 3, B + 2, B + 3]])
    losses = [model(*(x[images] for x in batch))[0] for images in together]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean = dict(zip(trained, torch.autograd.grad(sum(losses) / 2, list(trained.values()))))
    for half in (rank["accumulated"] for rank in found):
        same(half["gradients"], mean)
        assert half["synced"] == [False, True]
        norm = torch.cat([gradient.flatten() for gradient in mean.values()]).norm().item()
        assert half["values"][-1] == pytest.approx(norm)


def test_with_batch_norms_of_their_own_both_take_the_same_step_where_one_has_no_query(found):
    first, second = (rank["training"] for rank in found)
    same(first["gradients"], second["gradients"])
    assert all(g.isfinite().all() for g in first["gradients"].values())
    assert first["own"][2] > 0 == second["own"][2]


def test_ranks_agree_on_a_step_that_is_good_on_all_of_them_and_on_the_end(found):
    first, second = (rank["votes"] for rank in found)
    assert str(first) == str(second)  # as text, since nan is not equal to itself
    good = {name for name, (counts, *_) in first.items() if counts}
    assert good == {"finite", "stop on one", "trouble on one"}
    ends = {name: ended for name, (_, ended, _) in first.items() if ended}
    expected = {"stop on one": "signal", "trouble on one": "trouble", "all at once": "signal"}
    assert ends == expected and first["finite"][2] == [1.5, 4.0]


def test_a_sum_over_ranks_leaves_what_is_summed(found):
    for r, rank in enumerate(found):
        assert [x.tolist() for x in rank["sum"]] == [[3.0, 21.0], [1.0 + r, 10.0 + r]]


def keep_statistics(run):
    """What a norm of this process has seen, beside the folder of the run."""
    torch.save(run.model.student.backbone[1].running_mean, f"{run.folder}.{run.place.rank}.pth")


@pytest.mark.slow
def test_a_run_on_cpus_has_one_batch_norm_for_all_processes_where_it_is_asked(tmp_path):
    for sync_norm in ("torch", "ours"):
        folder, given = tmp_path / sync_norm, ("--sync-norm", sync_norm, "--max-steps", 3)
        more = dict(processes=2, accident=At(2, keep_statistics))
        statuses, printed = play(folder, *given, **more)
        assert statuses == [0, 0], printed
        first, second = (torch.load(f"{folder}.{rank}.pth") for rank in (0, 1))
        assert torch.equal(first, second) == (sync_norm == "ours")


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_devices_that_are_not_there_are_one_line(alone):
    alone.setattr(torch.cuda, "is_available", lambda: False)
    alone.setattr(torch.backends.mps, "is_available", lambda: True)
    assert processes.start("auto").device == CPU  # MPS is for those who ask for it
    alone.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"--device {device}, but this machine has none: use "):
            processes.start(device)
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: 2)
    alone.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="asks for GPU 2, found 2: start fewer processes, or use"):
        processes.start("auto")


def test_a_core_is_spare_for_one_float32_process_of_one_thread_on_a_cpu_with_more(alone):
    alone.setattr(processes, "cores", lambda: 2)
    assert processes.has_spare_core(Place(CPU))
    others = Place(torch.device("cuda")), Place(CPU, 0, 2), Place(CPU, dtype=torch.bfloat16)
    assert not any(processes.has_spare_core(place) for place in others)
    alone.setattr(torch, "get_num_threads", lambda: 2)
    assert not processes.has_spare_core(Place(CPU))
    alone.undo()
    alone.setattr(processes, "cores", lambda: 1)
    assert not processes.has_spare_core(Place(CPU))


def test_a_process_of_several_on_gpus_binds_its_group_to_its_gpu(alone):
    """Without a GPU: what would be asked of torch; and memory is said as it is reserved."""
    asked, set_to = {}, []
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: 4)
    alone.setattr(torch.cuda, "set_device", set_to.append)
    alone.setattr(torch.backends.cudnn, "benchmark", False)
    alone.setattr(dist, "init_process_group", lambda **given: asked.update(given))
    for name, value in dict(RANK=7, LOCAL_RANK=3, WORLD_SIZE=8).items():
        alone.setenv(name, str(value))
    own = torch.device("cuda", 3)
    assert processes.start("auto") == Place(own, 7, 8) and set_to == [own]
    assert (asked["backend"], asked["device_id"]) == ("nccl", own)
    alone.setattr(torch.cuda, "max_memory_reserved", lambda device: 5e9 if device == own else 0)
    assert processes.peak_memory_gb(own) == 5
    asked.clear()
    processes.start("cpu")
    assert asked["backend"] == "gloo" and not asked.get("device_id")


PRECISIONS = {  # --amp, device, whether a GPU has bf16 -> the type of autocast
    ("auto", "cpu", True): None,
    ("auto", "mps", True): None,
    ("auto", "cuda", True): torch.bfloat16,
    ("auto", "cuda", False): torch.float16,
    ("bf16", "cpu", False): torch.bfloat16,
    ("fp16", "cuda", True): torch.float16,
    ("off", "cuda", True): None,
}


def test_the_precision_is_what_the_device_can_do(alone):
    for (amp, device, has_bf16), expected in PRECISIONS.items():
        alone.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **_: has)
        assert processes.precision(amp, torch.device(device)) == expected


def test_cores_are_shared_among_the_processes_of_a_machine(alone):
    alone.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert processes.workers_of(0) == 0 and processes.workers_of(3) == 3
    for local, workers in ((1, 8), (4, 3), (50, 1)):
        alone.setenv("LOCAL_WORLD_SIZE", str(local))
        assert processes.workers_of(-1) == workers
