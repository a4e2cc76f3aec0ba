"""Two processes with half a batch each are one process with the whole batch; and processes.py's
small decisions.

Promised: loss, gradients, center, teacher and the log's numbers do not depend on how a batch is
split, whatever each half holds: unequal numbers of overlapping crops, no overlap, no query, in one
process or in both. No process waits for another. Batch norms are in evaluation mode here, since
only a GPU can synchronize them; one test leaves them training.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import zlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

import losses
from engine import processes, ranks, signals
from engine.lars import LARS
from engine.processes import Place
from measures.course import statistics
from slotcon import SlotCon
from slots import SlotPredictor

K, D, HIDDEN, H, W = 6, 7, 9, 4, 5
B = 4  # images per process

# -------------------------------------------------------------------------- what both sides compute


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(settings, alike):
    """A small SlotCon; alike: the teacher is the student but for the order of its prototypes."""
    model = SlotCon("tiny", K, HIDDEN, D, **settings).double()
    for name, p in model.named_parameters():
        noise = random(*p.shape, seed=zlib.crc32(name.encode()))
        p.data = (
            noise * math.sqrt(3 / p[0].numel())
            if p.ndim > 1
            else noise / 9 + name.endswith("weight")
        )
    if alike:
        model.teacher.load_state_dict(model.student.state_dict())
        model.teacher.prototypes.weight.data = model.teacher.prototypes.weight.roll(1, 0)
    model.center.copy_(random(K, seed=99) / 9)
    return model.eval()


def joined_batch(valid, flat):
    """2 B images of both processes; valid: whose crops overlap; flat: which show one color, the
    same.
    """
    views, flipped = random(2 * B, 2, 3, 4 * H, 4 * W, seed=7), random(2 * B, 2, seed=8) > 0
    low, high = (
        random(2 * B, 2, 2, seed=9).sigmoid() * 0.4,
        1 - random(2 * B, 2, 2, seed=10).sigmoid() * 0.4,
    )
    boxes = torch.cat([low, high], dim=2)
    boxes[~torch.tensor(valid)] = 0
    views[flat] = 0.5
    return views, boxes, flipped


ALL, NONE, FIRST = [True] * 2 * B, [False] * 2 * B, [True] * B + [False] * B
SOME = [
    True,
    False,
    True,
    True,
    False,
    False,
    True,
    False,
]  # three of the first process's, one of the second's
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


def step(model, wrapped, batch, passes=1):
    """One optimizer step as the training loop takes it; everything that comes out of it."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = LARS(list(trained.values()), 0.3)
    loss_sum, queries, parts = 0.0, [], [x.chunk(passes) for x in batch]
    for i, part in enumerate(zip(*parts)):
        with processes.exchange(wrapped, last=i == passes - 1):
            loss, report = wrapped(*part)
            (loss / passes).backward()
        loss_sum += loss.item() / passes
        queries.append(report)
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    optimizer.step()
    losses.update_center(model.center, torch.stack([r.center_mean for r in queries]).mean(0), 0.9)
    model.update_teacher(0.9)
    return dict(
        loss=loss_sum,
        parts=report.losses,
        gradients=gradients,
        state=model.state_dict(),
        statistics=statistics(report, model.center, 0.07),
    )


def of_rank(batch, rank):
    return [x[rank * B : (rank + 1) * B] for x in batch]


def half_masks():
    """Occupied slots of direction 1 in which process 0 has no query and process 1 has one."""
    student, teacher = (
        torch.zeros(2 * B, K, dtype=torch.bool),
        torch.zeros(2 * B, K, dtype=torch.bool),
    )
    student[0, 2], teacher[0, 3], student[B + 1, 4], teacher[B + 1, 4] = True, True, True, True
    return student, teacher


# ----------------------------------------------------------------------------- one of two processes


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    place, found = Place(torch.device("cpu"), rank, 2), {}
    for name, (settings, valid, flat) in CASES.items():
        model = build(settings, alike=bool(flat))
        found[name] = step(
            model, processes.wrap(model, place), of_rank(joined_batch(valid, flat), rank)
        )

    model = build({}, alike=False)
    wrapped = processes.wrap(model, place)
    found["accumulated"] = step(model, wrapped, of_rank(joined_batch(SOME, NOISE), rank), passes=2)
    found["exchanges"] = []
    for last in (False, True):
        with processes.exchange(wrapped, last):
            found["exchanges"].append(wrapped.require_backward_grad_sync)

    model = build({}, alike=True).train()  # batch norms that know this process's rows only
    found["training"] = step(
        model, processes.wrap(model, place), of_rank(joined_batch(ALL, SECOND_FLAT), rank)
    )

    found["rank"] = ranks.rank_and_world_size()
    x = torch.tensor([1.0, 10.0]) + rank
    found["sum"], found["kept"] = ranks.sum_over_ranks(x), x
    rows = random(5, D)
    found["rows"] = [
        ranks.gather_rows(rows[:2] if rank == 0 else rows[2:], [2, 3]),
        ranks.gather_rows(rows[:0] if rank == 0 else rows, [0, 5]),
    ]
    try:
        ranks.gather_rows(rows, [2, 3])
    except ValueError as error:
        found["complaint"] = str(error)
    predictor = SlotPredictor(D, D, HIDDEN)
    (pairs,) = losses.pair_slots(*[[of_rank([mask], rank)[0]] for mask in half_masks()])
    slots = torch.randn(B, K, D, requires_grad=True)
    lone = losses.slot_contrast(slots, slots.detach(), predictor, pairs, 0.2)
    lone.backward()
    found["one query"] = (
        pairs.num_queries,
        len(pairs.queries),
        lone.item(),
        slots.grad.abs().max().item(),
        [p.grad.abs().max().item() for p in predictor.parameters()],
    )
    torch.save(found, f"{folder}/{rank}.pth")
    processes.finish()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    server = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process could inherit a lock
    server.set_forkserver_preload(["torch", "torchvision", "einops"])
    processes = [server.Process(target=one_of_two, args=(rank, str(folder))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]


def same(a, b):
    """Equal to what float64 leaves; gradients that are zero up to rounding compare absolutely."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-8, atol=1e-13), name


# ----------------------------------------------------------------------------------- split = joined


@pytest.mark.parametrize("case", CASES)
def test_two_processes_with_half_a_batch_each_are_one_with_the_whole_batch(found, case):
    settings, valid, flat = CASES[case]
    model = build(settings, alike=bool(flat))
    whole = step(model, model, joined_batch(valid, flat))
    halves = [rank[case] for rank in found]
    assert sum(half["loss"] for half in halves) / 2 == pytest.approx(whole["loss"], rel=1e-10)
    assert torch.allclose(sum(half["parts"] for half in halves) / 2, whole["parts"], rtol=1e-10)
    for half in halves:
        same(half["gradients"], whole["gradients"])
        same(half["state"], whole["state"])  # center and teacher among it
        assert half["statistics"] == pytest.approx(whole["statistics"], rel=1e-6)  # in float32


def test_the_cases_are_what_their_names_say(found):
    whole = {}
    for name, (settings, valid, flat) in CASES.items():
        model = build(settings, alike=bool(flat))
        whole[name] = model(*joined_batch(valid, flat))[1].losses.tolist()
    assert whole["no overlap anywhere"][1] == 0 < whole["no overlap in one process"][1]
    assert whole["no query anywhere"][2] == 0
    for name in ("no query in one process", "no query in one process, reg"):
        first, second = (rank[name]["parts"][2].item() for rank in found)
        assert first > 0 == second  # a share of nothing
        assert first / 2 == pytest.approx(whole[name][2])
    first, second = (rank["method"]["parts"] for rank in found)
    assert (first != second).all()  # the halves are not alike


def test_of_several_passes_the_gradient_is_the_mean_over_passes_and_processes(found):
    """A pass is what both processes see at once."""
    model, (views, boxes, flipped) = build({}, alike=False), joined_batch(SOME, NOISE)
    together = [0, 1, B, B + 1, 2, 3, B + 2, B + 3]
    whole = step(model, model, (views[together], boxes[together], flipped[together]), passes=2)
    for half in found:
        same(half["accumulated"]["gradients"], whole["gradients"])
        same(half["accumulated"]["state"], whole["state"])
        assert half["exchanges"] == [False, True]
    assert sum(half["accumulated"]["loss"] for half in found) / 2 == pytest.approx(
        whole["loss"], rel=1e-10
    )


def test_with_batch_norms_of_their_own_both_take_the_same_step_where_one_has_no_query(found):
    first, second = (rank["training"] for rank in found)
    same(first["gradients"], second["gradients"])
    assert all(g.isfinite().all() for g in first["gradients"].values())
    assert first["parts"][2] > 0 == second["parts"][2]


# --------------------------------------------------------------------------------- the rank helpers


def test_ranks_know_their_place_and_sums_leave_what_is_summed(found):
    assert [rank["rank"] for rank in found] == [(0, 2), (1, 2)]
    for r, rank in enumerate(found):
        assert rank["sum"].tolist() == [3.0, 21.0]
        assert rank["kept"].tolist() == [1.0 + r, 10.0 + r]


def test_unequal_numbers_of_rows_are_gathered_in_the_order_of_the_ranks_even_none(found):
    for rank in found:
        assert all(rows.equal(random(5, D)) for rows in rank["rows"])
        assert "of 2 holds 5 rows, but the counts say [2, 3]" in rank["complaint"]


def test_a_single_query_in_all_processes_is_a_zero_that_is_connected_in_each(found):
    for r, rank in enumerate(found):
        in_all, here, loss, slots, parameters = rank["one query"]
        assert (in_all, here, loss, slots) == (1, r, 0, 0)
        assert parameters == [0] * 10


# ------------------------------------------------------------------------------ processes.py, alone


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_this_is_the_only_process(alone):
    assert processes.start("cpu", 60) == Place(torch.device("cpu"), 0, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "gpus, local_rank, advice", [(0, 0, "use --device cpu"), (2, 2, "or fewer processes")]
)
def test_a_gpu_that_is_not_there_is_one_line_and_no_crash(alone, gpus, local_rank, advice):
    alone.setattr(torch.cuda, "device_count", lambda: gpus)
    alone.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(ValueError) as error:
        processes.start("cuda", 60)
    assert f"asks for GPU {local_rank}, found {gpus}" in str(error.value) and advice in str(
        error.value
    )


def test_an_apple_gpu_that_is_not_there_is_one_line_too(alone):
    alone.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="--device mps, but this machine has no Apple GPU: use --device auto"
    ):
        processes.start("mps", 60)


@pytest.mark.parametrize("cuda, mps, expected", [(False, False, "cpu"), (False, True, "mps")])
def test_auto_takes_the_best_device_there_is(alone, cuda, mps, expected):
    alone.setattr(torch.cuda, "is_available", lambda: cuda)
    alone.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert processes.start("auto", 60).device.type == expected


@pytest.mark.parametrize(
    "amp, device, has_bf16, expected",
    [
        ("auto", "cpu", True, None),
        ("auto", "mps", True, None),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("bf16", "cpu", False, torch.bfloat16),
        ("fp16", "cuda", True, torch.float16),
        ("off", "cuda", True, None),
    ],
)
def test_the_precision_is_what_the_device_can_do(monkeypatch, amp, device, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert processes.precision(amp, torch.device(device)) == expected


def test_bf16_on_a_gpu_without_it_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(ValueError, match="--amp bf16, but Old GPU has no bf16: use --amp fp16"):
        processes.precision("bf16", torch.device("cuda"))


def test_a_process_on_its_own_is_not_wrapped_and_exchanges_nothing():
    model = nn.Linear(2, 3)
    assert processes.wrap(model, Place(torch.device("cpu"), 0, 1)) is model
    for last in (True, False):
        assert isinstance(processes.exchange(model, last), contextlib.nullcontext)


def test_a_signal_is_noted_and_afterwards_means_what_it_did_before(alone):
    before = {name: signal.getsignal(getattr(signal, name)) for name in signals.STATUS}
    with signals.StopSignals() as asked:
        assert asked.received == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.received == "SIGUSR1"  # the first counts
    assert {name: signal.getsignal(getattr(signal, name)) for name in signals.STATUS} == before


def test_a_person_who_insists_ends_the_run_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    asked = signals.StopSignals()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        asked.note(number, None)
        assert ended == []
    asked.note(signal.SIGINT, None)
    assert ended == [130]


def test_cores_are_shared_among_the_processes_of_a_machine_and_at_least_one(alone):
    alone.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert processes.cores_per_process() == 8 and processes.cores_per_process(most=20) == 12
    alone.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes.cores_per_process() == 3
    alone.setenv("LOCAL_WORLD_SIZE", "50")
    assert processes.cores_per_process() == 1


def test_a_place_is_described_in_a_few_words():
    assert "cpu" in processes.describe(Place(torch.device("cpu"), 0, 1), None)
    assert processes.describe(Place(torch.device("cpu"), 0, 1), None).endswith("1 process, float32")
    assert (
        processes.describe(Place(torch.device("mps"), 1, 2), torch.float16)
        == "mps, 2 processes, fp16"
    )


def test_the_peak_of_memory_never_falls_and_is_in_gigabytes():
    before = processes.peak_memory_gb(torch.device("cpu"))
    ballast = torch.ones(3, 10_000_000)
    assert (
        0.05 < before <= processes.peak_memory_gb(torch.device("cpu")) < 1000 and ballast.sum() > 0
    )
