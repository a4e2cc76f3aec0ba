"""engine/: what a run promises to any program, in one process and without ours."""

import copy
import errno
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time

import pytest
import torch
from torch import nn

from engine import batches
from engine.batches import order_of
from engine.folder import require_space
from engine.guards import lock
from engine.images import BadImage
from engine.processes import Place
from engine.program import BEGAN, Stopped
from engine.run import Options, Run, seed_of
from staged import At, Signals, difference, last_of, log_of, state_of

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
IMAGES = [torch.tensor([i, 2.0, i % 5]) / 7 for i in range(14)]  # three batches of four per epoch
LAST = 9


class Model(nn.Module):
    """A layer, and statistics that every forward moves."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(5)

    def forward(self, images):
        return self.norm(self.layer(images)).sigmoid().square().mean()


def noisy(image, rng):
    return image + rng.random()


def program(folder, accident=lambda run: None, view=noisy, dtype=None, **options):
    """A whole run. accident(run) may return what the loss of this step is multiplied by."""
    usual = dict(batch_size=4, last_step=LAST, workers=0, log_every=4)
    options = Options(str(folder) if folder else "", **{**usual, **options})
    torch.manual_seed(0)
    model, place = Model(), Place(CPU, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    given = IMAGES, view, dict(size=5)
    run = Run(options, place, model, optimizer, *given, names=("loss", "largest"))
    if dtype:  # whose scale is too large at first
        run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with run:
        for batch in run.batches():
            run.remember()
            factor = accident(run) or 1
            for (part,) in run.parts(batch):
                with run.autocast():
                    loss = run.network(part) * factor
                run.backward(loss)
            if run.agree(torch.stack([loss.float(), batch.max()])):
                run.step(0.1 / run.position if run.position else 0.1)
                run.notes["noise"] = torch.rand(2, generator=run.generator()).tolist()
            else:
                run.undo()
            run.end_step()
            if run.log_is_due():
                run.log(lambda record: f"loss {record['loss']:.3f}", rate=run.steps / 2)
    return run


def same(folder, other):
    """Whether two runs left the same bits: last.pth and the log, without the clock."""
    return not difference(state_of(folder), state_of(other))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert program(folder).end() == 0
    return folder


def test_a_position_has_one_batch_wherever_a_run_starts_and_ranks_share_it():
    def taken(start, rank=0, world_size=1, count=7):
        order = order_of(14, 4, Place(CPU, rank, world_size), seed=3, start=start)
        return list(itertools.islice(order, count))

    whole = taken(0)
    assert all(taken(start, count=2) == whole[start : start + 2] for start in range(5))
    halves = zip(taken(0, 0, 2), taken(0, 1, 2))
    assert [first + second for first, second in halves] == whole
    epochs = [[sample for batch in whole[i : i + 3] for sample in batch] for i in (0, 3)]
    for number, epoch in enumerate(epochs):
        assert len({sample - 14 * number for sample in epoch} & set(range(14))) == 12
    assert [s - 14 for s in epochs[1]] != epochs[0]
    assert next(order_of(14, 4, Place(CPU), seed=4)) != whole[0]


@pytest.mark.parametrize(
    "name, position",
    [("SIGTERM", 0), ("SIGINT", 1), ("SIGUSR1", 2), ("SIGHUP", 5), ("SIGTERM", LAST - 2)],
)
def test_a_run_that_a_signal_stops_goes_on_to_the_whole_run(name, position, whole, tmp_path, capfd):
    before = signal.getsignal(getattr(signal, name))
    stopped = program(tmp_path / "run", At(position, Signals(name)), resume="none")
    assert signal.getsignal(getattr(signal, name)) is before
    assert stopped.end() == (130 if name == "SIGINT" else 0) and not stopped.finished
    out, err = capfd.readouterr()
    assert f"stopped by {name} after step {position + 1} of {LAST}" in out
    assert ": the same command without --resume none goes on" in out
    assert f"{name} received: the run ends after this batch and saves" in err
    assert last_of(tmp_path / "run")["step"] == position + 1

    assert program(tmp_path / "run").end() == 0
    assert f"resumed  {tmp_path}/run/last.pth after step {position + 1}" in capfd.readouterr().out
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("saved", [3, None])
def test_work_that_was_lost_is_done_again_and_logged_once(saved, whole, tmp_path, capfd):
    """As kill -9 leaves a folder: the log is ahead of the checkpoint, and its last line cut off."""

    def killed(run):
        if run.position == saved:
            run.save()
        if run.position == 6:
            shutil.copytree(run.folder, tmp_path / "run")

    program(tmp_path / "first", killed)
    (tmp_path / "run" / ".last.pth.4194399.tmp").touch()
    log = tmp_path / "run" / "log.jsonl"
    assert log_of(tmp_path / "run")[-1]["step"] == 4
    log.write_text(log.read_text() + '{"step": 6, "los\n{"step": 2}')
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    program(tmp_path / "other", resume="none")
    lost = "no last.pth of an earlier run, a new run starts"
    assert lost not in capfd.readouterr().err
    program(tmp_path / "misspelled", resume="force")
    assert f"{tmp_path}/misspelled: {lost}" in capfd.readouterr().err
    program(tmp_path / "run")
    assert (f"{tmp_path}/run: {lost}" in capfd.readouterr().err) == (saved is None)
    assert same(tmp_path / "run", whole)
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["config.json", "last.pth", "log.jsonl", "run.lock"]


def test_a_finished_run_that_is_started_again_changes_nothing(whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run")
    left = [tmp_path / "run" / name for name in ("result.json", "groups.png", "epoch_0001.pth")]
    for file in left:
        file.touch()
    assert program(tmp_path / "run").finished and all(file.exists() for file in left)
    assert same(tmp_path / "run", whole)
    for n in (1, 2):
        assert program(tmp_path / "run", resume="none").steps == LAST  # this one starts over
        assert f"the earlier run are in previous_{n}/ now" in capfd.readouterr().err
        assert same(tmp_path / "run", whole) and same(tmp_path / "run" / f"previous_{n}", whole)
        assert not any(file.exists() for file in left)
    assert all((tmp_path / "run" / "previous_1" / file.name).exists() for file in left)


def test_a_signal_in_the_last_step_does_not_turn_the_end_into_a_pause(whole, tmp_path):
    run = program(tmp_path, At(LAST - 1, Signals("SIGINT")))
    assert run.end() == 0 and run.ended == "done" and same(tmp_path, whole)


def test_a_mistake_in_a_step_keeps_its_trace_and_what_was_learned_before_it(whole, tmp_path):
    def mistaken(run):
        if run.position == 5:
            run.model(torch.ones(4, 3))  # the statistics move
            raise ArithmeticError("a mistake of ours")

    with pytest.raises(ArithmeticError):
        program(tmp_path / "run", mistaken)
    assert last_of(tmp_path / "run")["step"] == 5
    program(tmp_path / "run")
    assert same(tmp_path / "run", whole)


def test_a_mistake_in_the_middle_of_moving_the_weights_is_not_saved(tmp_path, monkeypatch):
    plain = torch.optim.AdamW.step

    def broken(optimizer):
        plain(optimizer)
        if next(iter(optimizer.state.values()))["step"] == 4:
            raise ArithmeticError("a mistake of ours")

    program(tmp_path / "three", last_step=3)
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(ArithmeticError):
        program(tmp_path / "run", save_minutes=0)
    found, expected = (last_of(tmp_path / name) for name in ("run", "three"))
    assert found["step"] == 3 and not difference(found["model"], expected["model"])


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("factor", [NAN, INF, -INF])
def test_a_step_without_finite_numbers_leaves_no_trace_and_is_counted(factor, dtype, tmp_path):
    found = []

    def spoiled(run):
        moves = dict(model=run.model.state_dict(), optimizer=run.optimizer.state_dict()["state"])
        found.append((run.steps, copy.deepcopy(moves), run.scaler.get_scale()))
        return factor if run.position in (4, 5) else None

    run = program(tmp_path / "run", spoiled, dtype=dtype, log_every=1)
    steps, states, scales = zip(*found)
    assert steps[4:7] == (4, 4, 4) and steps[7] == 5 and run.bad_steps == 2
    assert not difference(states[4], states[6]) and difference(states[6], states[7])
    assert (run.steps, run.position) == (LAST, LAST + 2)  # bad steps are made up for
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, LAST + 1))
    assert [line["skipped_steps"] for line in lines] == [0] * 4 + [2] * 5
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert scales[6] == scales[4] / 4 if dtype else scales == (1,) * 11


def test_twenty_bad_steps_in_a_row_stop_a_run_and_nineteen_do_not(tmp_path):
    def spoiled(count):
        return lambda run: NAN if 3 <= run.position % 30 < 3 + count else None

    assert program(tmp_path / "run", spoiled(19), last_step=25).end() == 0
    assert last_of(tmp_path / "run")["bad_steps"] == 38
    program(tmp_path / "other", last_step=2)
    run = program(tmp_path / "other", spoiled(20), save_minutes=0)
    with pytest.raises(Stopped, match=r"20 steps in a row had no finite loss .* --resume force"):
        run.end()
    assert (last_of(tmp_path / "other")["step"], run.position) == (3, 23)


def test_a_run_that_is_paused_among_bad_steps_goes_on_counting_them(tmp_path):
    def spoiled(run):
        for position in (12, 17):
            At(position, Signals("SIGTERM"))(run)
        return NAN if run.position >= 3 else None

    program(tmp_path / "run", spoiled)
    program(tmp_path / "run", spoiled)
    run = program(tmp_path / "run", spoiled)
    assert (run.ended, run.position, run.steps) == ("diverged", 23, 3)


def test_a_line_averages_the_steps_since_the_last_one(whole, tmp_path):
    program(tmp_path / "each", log_every=1)
    each, some = log_of(tmp_path / "each"), log_of(whole)
    assert [line["step"] for line in each] == list(range(1, LAST + 1))
    assert [line["step"] for line in some] == [1, 4, 8, LAST]
    for line, (first, last) in zip(some, ((0, 1), (1, 4), (4, 8), (8, 9))):
        for name in ("loss", "largest", "grad_norm"):
            mean = sum(one[name] for one in each[first:last]) / (last - first)
            assert line[name] == pytest.approx(mean, rel=1e-12)
        assert line["rate"] == last / 2 and line["epoch"] == round(last / 3, 4)
    speeds = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 and line["memory_gb"] > 0.01 for line in speeds)
    assert all(0 < line["data_seconds"] < 1 for line in speeds)


def test_a_seed_a_position_and_a_rank_have_random_numbers_of_their_own(whole):
    seeds = {seed_of(*parts) for parts in itertools.product((0, 1), range(50), range(3))}
    assert len(seeds) == 300 and all(0 <= seed < 2**63 for seed in seeds)
    generator = torch.Generator().manual_seed(seed_of(0, LAST - 1, 0))
    assert last_of(whole)["notes"]["noise"] == torch.rand(2, generator=generator).tolist()


@pytest.mark.parametrize("options, spoil, held, names", [
    (dict(save_minutes=9), (), [None] * 9, []),
    (dict(save_minutes=0), (), [None, 1, 2, 3, 4, 5, 6, 7, 8], []),
    # After a bad step the checkpoint before it may be the better one
    (dict(save_minutes=0), (3, 4), [None, 1, 2, 3, 3, 3, 6, 7, 8, 9, 10], []),
    (dict(keep_every=1), (), [None] * 3 + [3] * 3 + [6] * 3, [1, 2, 3]),
    (dict(keep_every=2), (), [None] * 6 + [6] * 3, [2]),
    (dict(keep_every=1), (5,), [None] * 3 + [3] * 4 + [7] * 2 + [9], [1, 2, 3]),
])  # fmt: skip
def test_what_is_written_when(options, spoil, held, names, tmp_path):
    found = []  # the position that last.pth holds when each step begins

    def look(run):
        whole = (run.folder / "last.pth").exists()
        found.append(last_of(run.folder)["position"] if whole else None)
        return NAN if run.position in spoil else None

    program(tmp_path, look, **options)
    program(tmp_path, look, last_step=LAST + 1, **options)  # writes no epoch again
    found.pop()
    kept = [f"epoch_{epoch:04d}.pth" for epoch in names]
    assert found == held and sorted(f.name for f in tmp_path.glob("*.pth")) == [*kept, "last.pth"]
    for epoch, name in zip(names, kept):  # after a bad step it is written one step later
        position = torch.load(tmp_path / name, weights_only=True)["position"]
        assert position == 3 * epoch + (3 * epoch - 1 in spoil)
    assert last_of(tmp_path)["step"] == LAST + 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EAGAIN, errno.EACCES])
def test_a_file_system_without_locks_keeps_no_run_out(number, tmp_path, monkeypatch, capsys):
    def refuse(*_given):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    if number == errno.ENOLCK:
        lock(tmp_path).close()
        assert "is on a file system without locks" in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="is in use by another process"):
            lock(tmp_path)


def test_a_second_run_in_a_folder_is_refused_with_host_and_process(tmp_path, capfd):
    statuses = []

    def second(run=None):
        other = multiprocessing.get_context("fork").Process(target=lock, args=(tmp_path,))
        other.start()
        other.join()
        statuses.append(other.exitcode)

    program(tmp_path, second, last_step=2)
    second()
    assert statuses == [1, 1, 0]  # the run has ended
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    line = f"{tmp_path} is in use by {holder}: wait for it"
    assert line in capfd.readouterr().err


def test_readers_change_no_bit_and_end_at_once(whole, tmp_path, tmp_path_factory, monkeypatch):
    slow, readers = multiprocessing.Value("b", 0), []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("t")))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)

    def view(image, rng):
        time.sleep(60 * slow.value)
        return noisy(image, rng)

    def last(run):
        if run.position == LAST - 1:
            time.sleep(1)  # until they have read ahead
            slow.value = 1
            readers.extend(multiprocessing.active_children())

    began = time.monotonic()
    run = program(tmp_path / "run", last, view=view, workers=2)
    assert time.monotonic() - began < 30 and run.end() == 0
    assert readers and not any(reader.is_alive() for reader in readers if not reader.join(9))
    assert same(tmp_path / "run", whole)
    assert len(os.listdir(tempfile.tempdir)) <= 1  # this process's own, which its end removes


@pytest.mark.parametrize("first", [0, 4])
def test_a_signal_ends_the_wait_for_readers_that_hand_nothing_over(first, whole, tmp_path):
    """first: the position from which they sleep."""
    asleep = multiprocessing.Value("b", first == 0)

    def view(image, rng):
        time.sleep(600 * asleep.value)
        return noisy(image, rng)

    def sleep(run):
        asleep.value |= run.position == first

    threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    run = program(tmp_path / "run", sleep, view=view, workers=1, save_minutes=0)
    assert run.end() == 0 and run.ended == "signal" and time.monotonic() - began < 60
    assert (first < run.steps < LAST) if first else run.steps == 0
    assert program(tmp_path / "run").end() == 0
    assert same(tmp_path / "run", whole)


def test_two_readers_that_hand_nothing_over_for_long_stop_a_run_with_a_line(tmp_path, monkeypatch):
    """At once: PyTorch would wait 5 s for each of them."""
    monkeypatch.setattr(batches, "PATIENCE", 1)
    sleep, began = lambda image, rng: time.sleep(600), time.monotonic()
    with pytest.raises(Stopped, match=r"\(nothing for 1 s\): try .* or --workers 0; no step was"):
        program(tmp_path, view=sleep, workers=2).end()
    assert time.monotonic() - began < 9


def test_a_disk_on_which_checkpoints_do_not_fit_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"the disk of .* is too small: checkpoints need 0\.000"):
        program(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    model = torch.nn.Linear(10, 10)  # 440 bytes, and as many of velocity
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="is too small"):
        require_space(tmp_path, model, optimizer)
    (tmp_path / "last.pth").touch()
    require_space(tmp_path, model, optimizer)


def test_a_bar_on_a_terminal_counts_the_steps_within_79_columns(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "79")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    run = program(tmp_path / "run", lambda run: run.print("many  words " * 9, "and more"))
    assert run.seconds == pytest.approx(time.perf_counter() - BEGAN, abs=0.5)  # of the program
    out, err = capfd.readouterr()
    assert "many  words many\n         words" in out and "\nand more\n" in out
    lines = (out + err).replace("\r", "\n").splitlines()
    assert f"{LAST}/{LAST}" in err and max(map(len, lines)) <= 79
    assert "step 8/9" in out


def test_images_that_are_gone_stop_a_run_with_a_line_and_a_checkpoint(whole, tmp_path):
    away = []

    def view(image, rng):
        if away:
            raise BadImage("a.png", "no such file or directory")
        return noisy(image, rng)

    def go(run):
        away.extend([True] * (run.position == 4))

    reason = "^14 images in a row could not be read; a.png: no such file or directory; "
    with pytest.raises(Stopped, match=f"{reason}{tmp_path}/run/last.pth holds step 5"):
        program(tmp_path / "run", go, view=view).end()
    with pytest.raises(Stopped, match=f"{reason}no step was taken"):
        program(tmp_path / "other", view=view).end()
    program(tmp_path / "run")
    assert same(tmp_path / "run", whole)
