"""engine/: each piece of a run owns one invariant, and keeps it whatever program uses it.

Every piece is given the objects it works on; no program is run and nothing of ours is replaced.
"""

import dataclasses
import itertools
import math
import multiprocessing
import os
import random
import signal
import time
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

import staged
from engine import checkpoint
from engine.batches import Batches, run_batches
from engine.gradient import Gradient
from engine.images import BadImage
from engine.keeper import BEFORE, Keeper, nothing_finite
from engine.loader import Skipped, moved
from engine.meter import Meter
from engine.processes import Place
from engine.program import Stopped, run_program
from engine.progress import Progress
from engine.schedule import Schedule
from engine.signals import ReaderDied, ReaderWatch
from engine.undo import Undo
from engine.verdict import Verdict, agree

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
GOOD = Verdict(True, [1.0], stop=False, trouble=False)
BAD = Verdict(False, [NAN], stop=False, trouble=False)


# ---------------------------------------------------------------------------------------- schedule


def test_the_rate_climbs_in_a_line_and_falls_along_a_cosine():
    schedule = Schedule(5, total_steps=50, warmup_steps=10, last_step=50, peak=2.0)
    rates = [schedule.learning_rate(step) for step in range(51)]
    assert rates[0] == pytest.approx(0.02) and rates[10] == 2.0 and rates[50] == pytest.approx(1e-6)
    rises = [b - a for a, b in itertools.pairwise(rates[:11])]
    assert rises == pytest.approx([1.98 / 10] * 10)
    assert rates[30] == pytest.approx((2.0 + 1e-6) / 2)  # half of the way down
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_an_earlier_end_changes_no_rate_and_no_schedule_changes_itself():
    whole = Schedule(5, 50, 10, last_step=50, peak=2.0)
    part = dataclasses.replace(whole, last_step=20)
    assert all(whole.learning_rate(step) == part.learning_rate(step) for step in range(21))
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.last_step = 30


def test_epochs_end_at_whole_multiples_of_their_batches():
    schedule = Schedule(7, 70, 0, 70, 1.0)
    assert [position for position in range(1, 30) if schedule.ends_epoch(position)] == [
        7,
        14,
        21,
        28,
    ]


def test_a_run_without_warm_up_and_one_of_warm_up_alone_have_rates_too():
    assert Schedule(1, 4, 0, 4, 3.0).learning_rate(0) == pytest.approx(3.0)
    assert math.isfinite(Schedule(1, 4, 4, 4, 3.0).learning_rate(4))


# ----------------------------------------------------------------------------------------- batches


def batches_from(made, tmp_path, max_share=0.5, file="skipped.txt"):
    """Batches over an iterator; skipped files are counted among ten images."""
    return Batches(made, Skipped(tmp_path / file, 10, max_share), lambda: "stand-in")


def dying(error, after=2):
    for number in range(after):
        yield f"batch {number}", []
    raise error


@pytest.mark.parametrize(
    "error, line",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "has died"),
        (OSError("Too many open files"), "Too many open files"),
        (ValueError("Trace\n  line\nValueError: 64 images in a row"), "no more images: 64 images"),
        (ValueError("64 images in a row"), "no more images: 64 images in a row"),
        (RuntimeError(""), "has died"),
        (OSError(), "has died"),
        (EOFError(), "has died"),  # its worker was killed while it handed over a batch
    ],
)
def test_a_dead_loader_gives_the_stand_in_and_one_line_for_ever_after(error, line, tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    batches = batches_from(dying(error), tmp_path)
    assert [batches.next(), batches.next(), batches.trouble] == ["batch 0", "batch 1", ""]
    assert batches.next() == "stand-in"
    first = batches.trouble
    assert line in first and "\n" not in first
    assert [batches.next() for _ in range(3)] == ["stand-in"] * 3  # the loader is gone for good
    assert batches.trouble == first
    signal.signal(signal.SIGCHLD, before)


def test_the_death_of_a_reader_is_raised_while_waiting_and_at_no_other_time():
    """And the death of any other child is none of its business."""
    fork = multiprocessing.get_context("fork")
    before = signal.getsignal(signal.SIGCHLD)
    other, reader = (fork.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2))
    other.start()
    watch = ReaderWatch()
    try:
        with watch.waiting():  # for the first batch, which starts the readers
            reader.start()
        with watch.waiting():
            kill_and_wait(other)
        with pytest.raises(ReaderDied, match=f"process {reader.pid}"), watch.waiting():
            kill_and_wait(reader)
            raise AssertionError("the signal has said nothing")
        kill_and_wait(reader)  # in the middle of a step: nothing is raised
        signal.raise_signal(signal.SIGCHLD)
        with pytest.raises(ReaderDied, match=f"process {reader.pid}"), watch.waiting():
            raise AssertionError("nobody is left to wait for")
        watch.close()
        assert signal.getsignal(signal.SIGCHLD) is before
    finally:
        signal.signal(signal.SIGCHLD, before)


def kill_and_wait(process):
    process.kill()
    while process.is_alive():  # the signal comes in here
        time.sleep(0.01)


def test_too_many_bad_images_are_trouble_but_their_batch_is_still_a_batch(tmp_path):
    made = iter([("one", [("a", "empty")]), ("two", [("b", "empty")]), ("three", [])])
    batches = batches_from(made, tmp_path, max_share=0.1)
    assert (batches.next(), batches.trouble) == ("one", "")
    assert batches.next() == "two"
    assert "2 of 10 images could not be read" in batches.trouble
    assert batches.next() == "three" and "2 of 10" in batches.trouble


def test_a_list_of_bad_images_that_cannot_be_written_costs_a_line_and_not_the_run(tmp_path, capfd):
    (tmp_path / "skipped.txt").mkdir()
    batches = batches_from(iter([("one", [("a", "empty")])]), tmp_path)
    assert (batches.next(), batches.trouble) == ("one", "")
    assert "could not write to" in capfd.readouterr().err


class Unreadable:
    """Seven images of which none can be read from a position on."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        raise BadImage(f"{index}.png", "no such file or directory")


def test_an_unreadable_disk_gives_a_stand_in_of_the_shape_of_a_batch(tmp_path):
    def view(image, rng):
        return dict(views=torch.stack([image[:, :5, :6]] * 2), number=rng.randrange(9))

    skipped = Skipped(tmp_path / "skipped.txt", 7)
    batches = run_batches(Unreadable(), view, 6, 0, 0, Place(CPU, 0, 2), 0, skipped)
    batch = batches.next()
    assert batch["views"].shape == (3, 2, 3, 5, 6) and batch["number"].shape == (3,)
    assert batches.trouble.startswith("no more images: 7 images in a row could not be read")
    batches.close()


def test_the_time_waited_is_counted_once_also_for_a_batch_that_does_not_come(tmp_path):
    batches = batches_from(dying(OSError("gone"), after=1), tmp_path)
    assert batches.waited_since() == 0
    batches.next()
    first = batches.waited_since()
    assert first > 0 and batches.waited_since() == 0
    batches.next()
    assert batches.waited_since() > 0


class Ramp:
    """Images whose pixels are their number."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


def test_a_position_has_the_same_batch_wherever_a_run_starts_and_ranks_share_it(tmp_path):
    def taken(position, rank, world_size):
        skipped = Skipped(tmp_path / "skipped.txt", 8)
        place = Place(CPU, rank, world_size)
        batches = run_batches(
            Ramp(), lambda image, rng: (image[0, 0, 0].long(), rng.random()), 4, 3, position, place,
            0, skipped,
        )  # fmt: skip
        return list(zip(*(part.tolist() for part in batches.next())))

    for position in range(5):
        halves = taken(position, 0, 2) + taken(position, 1, 2)
        assert halves == taken(position, 0, 1) and len(halves) == 4
    assert taken(4, 0, 1) != taken(0, 0, 1) != taken(2, 0, 1)
    first_epoch = taken(0, 0, 1) + taken(1, 0, 1)
    assert sorted(index for index, _ in first_epoch) == list(range(8))


# -------------------------------------------------------------------------------------------- undo


def touched():
    return [torch.randn(3, 4), torch.tensor(5), torch.randn(2, dtype=torch.float64)]


def spoil(tensors):
    for tensor in tensors:
        tensor.mul_(3).add_(1)
    tensors[0][0, 0] = NAN


def test_what_a_bad_step_touched_returns_bit_for_bit():
    tensors = touched()
    before, undo = [t.clone() for t in tensors], Undo(tensors)
    spoil(tensors)  # a step that counted before the one that is remembered
    tensors[0][0, 0] = 0.1
    before = [t.clone() for t in tensors]
    undo.remember()
    spoil(tensors)
    undo.undo()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before))


@pytest.mark.parametrize("end", ["undo", "forget"])
def test_undo_does_nothing_where_no_step_is_under_way(end):
    tensors = touched()
    undo = Undo(tensors)
    spoil(tensors)
    after = [t.clone() for t in tensors]
    undo.undo()  # before any step
    undo.remember()
    getattr(undo, end)()
    spoil(tensors)
    spoiled = [t.clone() for t in tensors]
    undo.undo()
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(tensors, spoiled))
    assert not torch.equal(tensors[1], after[1])


def test_nothing_to_undo_is_no_error():
    undo = Undo([])
    undo.remember()
    undo.undo()


# ----------------------------------------------------------------------------------------- verdict

VOTES = {  # name -> values, stop and trouble of two ranks
    "finite": ([[1.0, 3.0], [2.0, 5.0]], [False, False], [False, False]),
    "nan on one": ([[1.0, 3.0], [NAN, 5.0]], [False, False], [False, False]),
    "inf on one": ([[1.0, INF], [2.0, 5.0]], [False, False], [False, False]),
    "inf against -inf": ([[INF, 1.0], [-INF, 1.0]], [False, False], [False, False]),
    "sum beyond float32": ([[3e38, 1.0], [3e38, 1.0]], [False, False], [False, False]),
    "stop on one": ([[1.0, 3.0], [2.0, 5.0]], [False, True], [False, False]),
    "trouble on one": ([[1.0, 3.0], [2.0, 5.0]], [False, False], [True, False]),
    "all at once": ([[NAN, 3.0], [2.0, 5.0]], [True, False], [False, True]),
}


@pytest.mark.parametrize(
    "values, stop, trouble, good",
    [
        ([1.0, 2.0], False, False, True),
        ([1.0, NAN], False, False, False),
        ([INF, 2.0], False, False, False),
        ([INF, -INF], False, False, False),
        ([1.0, 2.0], True, False, True),
        ([1.0, 2.0], False, True, False),
    ],
)
def test_alone_a_step_is_good_where_all_is_finite_and_nobody_is_in_trouble(
    values, stop, trouble, good
):
    verdict = agree(torch.tensor(values), stop, trouble)
    assert (verdict.good, verdict.stop, verdict.trouble) == (good, stop, trouble)
    assert str(verdict.values) == str(values)  # as text, since nan is not equal to itself


def vote(rank, folder):
    """One of two processes: its verdict in each case."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {
        name: tuple(agree(torch.tensor(values[rank]), stop[rank], trouble[rank]))
        for name, (values, stop, trouble) in VOTES.items()
    }
    torch.save(found, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_ranks_reach_the_same_verdict_on_the_means_of_both(tmp_path):
    server = multiprocessing.get_context("forkserver")
    both = [server.Process(target=vote, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(staged.PATIENCE)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert str(first) == str(second)
    good = {name for name, (counts, *_) in first.items() if counts}
    assert good == {"finite", "stop on one"}
    assert first["finite"] == (True, [1.5, 4.0], False, False)
    stops = {name for name, (_, _, stop, _) in first.items() if stop}
    troubles = {name for name, (_, _, _, trouble) in first.items() if trouble}
    assert (stops, troubles) == ({"stop on one", "all at once"}, {"trouble on one", "all at once"})


# ---------------------------------------------------------------------------------------- progress


def after(*verdicts, last_step=9, max_bad_steps=3):
    progress = Progress(last_step, max_bad_steps)
    for verdict in verdicts:
        progress.advance(verdict)
    return progress


def test_a_position_is_a_step_or_a_bad_step_and_bad_ones_in_a_row_end_with_a_good_one():
    progress = after(GOOD, BAD, BAD, GOOD, BAD)
    counts = (progress.step, progress.position, progress.bad_steps, progress.bad_in_row)
    assert counts == (2, 5, 3, 1) and not progress.finished and progress.ended == ""


STOP, BAD_STOP = GOOD._replace(stop=True), BAD._replace(stop=True)
TROUBLE = BAD._replace(trouble=True)


@pytest.mark.parametrize(
    "verdicts, last_step, ended, position",
    [
        ([GOOD] * 2, 2, "done", 2),
        ([BAD, GOOD, GOOD], 2, "done", 3),  # a bad step is made up for
        ([BAD] * 3, 9, "diverged", 3),
        ([BAD, BAD, BAD_STOP], 9, "diverged", 3),
        ([GOOD, STOP], 9, "signal", 2),
        ([GOOD, BAD_STOP], 9, "signal", 2),
        ([GOOD, STOP], 2, "done", 2),  # asked to stop in its last step
        ([GOOD, TROUBLE], 9, "trouble", 1),  # its batch is met again
        ([GOOD, TROUBLE._replace(stop=True)], 9, "trouble", 1),
        ([BAD, BAD, TROUBLE], 9, "trouble", 2),
        ([], 0, "", 0),
    ],
)
def test_how_a_run_ends(verdicts, last_step, ended, position):
    progress = after(*verdicts, last_step=last_step)
    assert (progress.ended, progress.finished, progress.position) == (ended, True, position)
    for count in range(len(verdicts)):
        assert not after(*verdicts[:count], last_step=last_step).finished


def test_progress_goes_on_from_what_was_kept():
    first, second = after(GOOD, BAD, GOOD, BAD), Progress(9, 3)
    second.restore(first.state())
    assert second.state() == first.state() and second.bad_in_row == 1
    second.advance(GOOD)
    assert (second.step, second.position, second.bad_steps) == (3, 5, 2)


# ------------------------------------------------------------------------------------------- meter


@pytest.mark.parametrize("restart_after", [0, 1, 3, 4, 5, 8])
def test_a_line_averages_exactly_the_steps_since_the_last_also_across_a_restart(restart_after):
    rng = random.Random(4)
    steps = [(rng.random(), rng.random()) for _ in range(9)]
    meter, since, lines = Meter(("loss", "norm"), 6), 0, []
    for step, values in enumerate(steps, 1):
        meter.add(values)
        if step in (3, 4, 9):
            line = meter.read(step)
            expected = [sum(column) / (step - since) for column in zip(*steps[since:step])]
            assert [line["loss"], line["norm"]] == pytest.approx(expected, rel=1e-12)
            since = step
            lines.append(line["steps_timed"])
        if step == restart_after:
            saved = dict(step=step, **meter.state())
            meter = Meter(("loss", "norm"), 6)
            meter.restore(saved)
    timed = {0: [3, 1, 5], 1: [2, 1, 5], 5: [3, 1, 4], 8: [3, 1, 1]}
    assert lines == timed.get(restart_after, [3, 1, 5])  # a speed is of this process's steps only


def test_what_was_kept_does_not_change_with_the_meter():
    meter = Meter(("loss",), 2)
    meter.add([1.0])
    kept = meter.state()
    meter.add([5.0])
    assert kept == dict(logged=0, sums=[1.0])


# ------------------------------------------------------------------------------------------ keeper


class States:
    """What a run would write: its progress, and the number of the good step it comes from."""

    def __init__(self, keeper, progress):
        self.keeper, self.progress, self.taken = keeper, progress, 0

    def __call__(self):
        self.taken += 1
        return dict(**self.progress.state(), weights=torch.tensor(self.progress.step))

    def play(self, verdicts):
        """What last.pth holds after each verdict: step and position."""
        held, last = [], self.keeper.folder / "last.pth"
        for verdict in verdicts:
            self.progress.advance(verdict)
            self.keeper.keep(self.progress, verdict.good, self)
            saved = checkpoint.read(last) if last.exists() else dict(step=None, position=None)
            held.append((saved["step"], saved["position"]))
        return held


def keeping(folder, last_step=99, max_bad_steps=99, **options):
    return States(Keeper(folder, 3, **options), Progress(last_step, max_bad_steps))


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_checkpoint_that_is_due_waits_for_a_good_step(tmp_path):
    held = keeping(tmp_path).play([GOOD, GOOD, BAD, BAD, BAD, BAD, GOOD, GOOD, GOOD])
    none = (None, None)
    assert held == [none] * 6 + [(3, 7)] * 2 + [(5, 9)]


def test_a_state_that_was_followed_by_bad_steps_only_is_never_written(tmp_path):
    rng = random.Random(5)
    for _ in range(20):
        states, verdicts = keeping(tmp_path), []
        for _ in range(30):
            states.progress.advance(GOOD if rng.random() < 0.5 else BAD)
            good, taken = states.progress.bad_in_row == 0, states.taken
            states.keeper.keep(states.progress, good, states)
            verdicts.append(good)
            assert good or states.taken == taken
        assert states.taken > 3 and 5 < sum(verdicts) < 25


def test_a_run_that_diverges_writes_nothing_more(tmp_path):
    states = keeping(tmp_path, max_bad_steps=4)
    held = states.play([GOOD, GOOD, GOOD, BAD, BAD, BAD, BAD])
    assert states.progress.ended == "diverged" and set(held[2:]) == {(3, 3)}


@pytest.mark.parametrize("end", [STOP, BAD_STOP, TROUBLE])
def test_every_other_end_is_written_whatever_is_due(end, tmp_path):
    states = keeping(tmp_path, save_every=50)
    assert states.play([GOOD, GOOD, end])[-1] == (states.progress.step, states.progress.position)


def test_a_pause_among_bad_steps_keeps_the_checkpoint_before_them_until_a_step_is_good(tmp_path):
    """Its good steps are not lost, and neither is the older state, should its weights be broken."""
    states, before = keeping(tmp_path), tmp_path / BEFORE
    assert states.play([GOOD, GOOD, GOOD, GOOD, BAD, BAD_STOP])[-1] == (4, 6)
    assert checkpoint.read(before)["step"] == 3
    assert f"; {before} is an earlier one" in nothing_finite(9, False, tmp_path / "last.pth")
    states.progress.ended = ""
    assert states.play([BAD_STOP])[-1] == (4, 7) and checkpoint.read(before)["step"] == 3
    states.progress.ended = ""
    assert states.play([STOP])[-1] == (5, 8) and names_in(tmp_path) == ["last.pth"]


def test_a_run_that_is_paused_again_and_again_still_finds_that_it_diverges():
    one = Progress(9, max_bad_steps=3)
    for verdict in (GOOD, BAD_STOP, BAD_STOP, BAD_STOP):
        saved = one.state()
        one = Progress(9, max_bad_steps=3)
        one.restore(saved)
        one.advance(verdict)
    assert one.ended == "diverged"
    old = {name: count for name, count in saved.items() if name != "bad_in_row"}
    one.restore(old)  # of a file written before this count was kept
    assert one.bad_in_row == 0


def test_which_files_remain(tmp_path):
    keeping(tmp_path, last_step=21, save_every=2, keep_every=3, keep_last=2).play([GOOD] * 21)
    kept = ["epoch_0003.pth", "epoch_0004.pth", "epoch_0006.pth", "last.pth"]
    assert names_in(tmp_path) == kept  # due: 2, 3, 4, 6, and the end, which no epoch is kept of
    other = tmp_path / "other"
    other.mkdir()
    keeping(other, last_step=12).play([GOOD] * 12)
    assert names_in(other) == ["last.pth"]


def test_an_epoch_whose_end_was_bad_is_kept_after_the_next_good_step(tmp_path):
    keeping(tmp_path, keep_every=1).play([GOOD, GOOD, BAD, GOOD])
    assert checkpoint.read(tmp_path / "epoch_0001.pth")["position"] == 4


def test_other_ranks_write_nothing_and_take_no_state(tmp_path):
    states = keeping(tmp_path, last_step=6, is_main=False)
    states.play([GOOD] * 6)
    assert states.taken == 0 and names_in(tmp_path) == []


class Full(Keeper):
    """A keeper whose disk is full from some step on: its folder is one that nobody can make."""

    def write(self, state, final=False):
        whole = self.folder
        if state["step"] > 3:
            self.folder = whole / "last.pth"  # a file, so nothing can be written in it
        super().write(state, final)
        self.folder = whole


@pytest.mark.parametrize("stop_on_error", [False, True])
def test_a_full_disk_is_a_value_and_no_exception(stop_on_error, tmp_path, capfd):
    keeper = Full(tmp_path, 3, stop_on_error=stop_on_error)
    states = States(keeper, Progress(9))
    held = states.play([GOOD] * 6)
    assert held[-1] == (3, 3)  # what stood there is intact
    said = capfd.readouterr().err
    assert bool(keeper.trouble) == stop_on_error and ("the run goes on" in said) != stop_on_error
    states.play([GOOD] * 3)
    assert (
        "after step" in keeper.trouble and "\n" not in keeper.trouble
    )  # the last one always counts
    assert ("step 6" if stop_on_error else "step 9") in keeper.trouble  # the first reason stays


# ---------------------------------------------------------------------------------------- gradient


class Linear(nn.Module):
    """A model without batch norm: a mean over images, so parts add up to the whole."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(3, 2), nn.Linear(1, 1)

    def forward(self, images, targets):
        loss = (self.layer(images) - targets).square().mean()
        return loss, len(images)


def gradient_of(dtype=None, accumulate=1):
    torch.manual_seed(1)
    model = Linear().double() if dtype is None else Linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, Gradient(model, optimizer, CPU, dtype, accumulate)


def inputs(dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(12, 3).to(dtype), torch.randn(12, 2).to(dtype)


def test_parts_have_the_gradient_the_norm_and_the_step_of_the_whole():
    whole, _ = gradient_of()
    images, targets = inputs()
    loss, _ = whole(images, targets)
    wanted = torch.autograd.grad(loss, list(whole.layer.parameters()))
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    for parts in (1, 2, 3, 4, 12):
        model, gradient = gradient_of(accumulate=parts)
        before = [p.detach().clone() for p in model.layer.parameters()]
        reports, found = gradient.compute(images, targets)
        assert reports == [12 // parts] * parts
        assert found.item() == pytest.approx(norm.item(), rel=1e-12)
        for p, g in zip(model.layer.parameters(), wanted):
            torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=0)
        gradient.step(0.7)
        for p, old, g in zip(model.layer.parameters(), before, wanted):
            torch.testing.assert_close(p.detach(), old - 0.7 * g, rtol=1e-12, atol=0)
        gradient.clear()
        assert all(p.grad is None for p in model.parameters())


def test_the_scale_of_fp16_leaves_no_trace_in_gradient_and_norm():
    images, targets = inputs(torch.float32)
    model, gradient = gradient_of(torch.float16)
    assert gradient.scaler.is_enabled() and gradient.scaler.get_scale() == 65536
    gradient.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    _, norm = gradient.compute(images, targets)
    exact, reference = gradient_of(None)
    _, expected = reference.compute(*inputs())
    assert norm.item() == pytest.approx(expected.item(), rel=0.01)
    for p, q in zip(model.layer.parameters(), exact.layer.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0.02, atol=0.002)


def test_a_scale_that_is_too_large_is_seen_in_the_norm_and_halved_and_found_again():
    images, targets = inputs(torch.float32)
    _, gradient = gradient_of(torch.float16)
    gradient.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    _, norm = gradient.compute(images, targets)
    assert not norm.isfinite()
    gradient.clear()
    assert gradient.scaler.get_scale() == 2.0**39
    for _ in range(40):
        _, norm = gradient.compute(images, targets)
        gradient.clear()
        if norm.isfinite():
            break
    assert norm.isfinite() and gradient.scaler.get_scale() < 2.0**39


def test_without_half_precision_and_in_bf16_there_is_no_scale():
    for dtype in (None, torch.bfloat16):
        assert not gradient_of(dtype)[1].scaler.is_enabled()


# ----------------------------------------------------------------------------------------- program


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("--k 1 is too small"), 2, "--k 1 is too small"),
        (FileNotFoundError(2, "No such file", "x"), 2, "[Errno 2] No such file: 'x'"),
        (Stopped("the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), 2, "2.00 GiB more were wanted"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(error, status, line, capfd, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_program("x.py", raising(error), []) == status
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("x.py: ") and line in err and err.count("\n") == 1


@pytest.mark.parametrize("status", [0, 3])
def test_the_status_of_a_program_that_ends_by_itself_is_its_own(status, capfd):
    assert run_program("x.py", lambda argv: status + len(argv), []) == status
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("x"), TypeError("y")])
def test_a_mistake_of_ours_keeps_its_trace(error):
    with pytest.raises(type(error)) as caught:
        run_program("x.py", raising(error), [])
    assert caught.value is error
    assert any(entry.name == "main" for entry in caught.traceback)


# -------------------------------------------------------------------------------------------- moved


def test_moved_keeps_the_shape_of_any_nest():
    Pair = namedtuple("Pair", "left right")
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    nest = {"a": Pair(one, [two, "text"]), "b": (three, None, 4), "c": {"d": []}}
    seen = moved(nest, len)
    assert seen == {"a": Pair(1, [2, "text"]), "b": (3, None, 4), "c": {"d": []}}
    assert type(seen["a"]) is Pair and type(seen["a"].right) is list and type(seen["b"]) is tuple
    assert nest["b"][0] is three  # the batch itself stays as it is
