"""measures/learning.py: the numbers of a step, the law, and the warnings."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

from grouping import inverse_augmentation
from measures import learning
from measures.learning import ViewCorrelation, Watch, law_line, view_correlation
from slotcon import SlotCon
from trained import record

RECORDED = Path(__file__).parent / "recorded"
B, K, H, W = 3, 5, 8, 8  # images, prototypes, cells of a 32 px view


def features(b=40, n=60, rhos=(0.75, 0.5, 0.2, 0.0, 0.0), seed=0):
    """Two views (b n c) of places whose feature c correlates by rhos[c]: x1 = r s + e, x2 too."""
    generator = torch.Generator().manual_seed(seed)
    shared, one, two = torch.randn(3, b, n, len(rhos), generator=generator)
    rho = torch.tensor(rhos)
    return tuple(rho.sqrt() * shared + (1 - rho).sqrt() * own for own in (one, two))


def maps(b=24, c=3, h=6, w=7):
    """Maps (b c h w) of the same scenes with some noise, boxes and flips of whole views."""
    generator = torch.Generator().manual_seed(0)
    scene, one, two = torch.randn(3, b, c, h, w, generator=generator)
    flipped = torch.rand(b, 2, generator=generator) < 0.5
    pairs = zip(flipped.T[..., None, None, None], (scene + one, scene + two))
    views = [torch.where(flip, view.flip(-1), view) for flip, view in pairs]
    return views, torch.tensor([0.0, 0, 1, 1]).expand(b, 2, 4).clone(), flipped


def correlation_of(batches):
    found = ViewCorrelation()
    for batch in batches:
        found.add(*batch)
    return found.value()


def a_model():
    torch.manual_seed(0)
    return SlotCon("tiny", num_prototypes=K, dim_hidden=12, dim_out=6).train()


def batches(count=3, b=B):
    """Batches (views, boxes, flipped) of two similar views of whole scenes."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        scene = torch.randn(b, 1, 3, 4 * H, 4 * W, generator=generator)
        views = scene + 0.1 * torch.randn(b, 2, 3, 4 * H, 4 * W, generator=generator)
        flipped = torch.rand(b, 2, generator=generator) < 0.5
        yield views, torch.tensor([0.0, 0, 1, 1]).expand(b, 2, 4).clone(), flipped


def test_the_numbers_of_a_step_are_counted_over_pixels_and_images_whose_crops_overlap():
    model, ((views, boxes, flipped),) = a_model(), batches(1)
    boxes[1] = 0
    _, report = model(views, boxes, flipped)
    center, t1, t2 = torch.randn(K) / 10, *report.teacher
    found = learning.statistics(report, center, 0.03)

    maps = [one for view in (t1, t2) for one in view.similarity]  # (k h w)
    rows = torch.cat([rearrange(one - center[:, None, None], "k h w -> (h w) k") for one in maps])
    p = (rows.double() / 0.03).softmax(1).tolist()
    entropies = [-sum(x * math.log(x) for x in row if x) for row in p]
    mean = [sum(column) / len(p) for column in zip(*p)]
    owned = [set(one.argmax(0).flatten().tolist()) for one in maps]
    pairs = zip(report.student, (t2, t1))
    same = [(s.aligned[i].argmax(0) == t.aligned[i].argmax(0)) for s, t in pairs for i in (0, 2)]
    assert found == dict(
        occupied_per_image=pytest.approx(sum(map(len, owned)) / 6),
        prototypes_used=len(set.union(*owned)),
        entropy_teacher=pytest.approx(sum(entropies) / len(entropies), rel=1e-4),
        entropy_mean=pytest.approx(-sum(x * math.log(x) for x in mean), rel=1e-4),
        agreement=pytest.approx(torch.stack(same).float().mean().item()),
    )
    _, report = model(views, torch.zeros_like(boxes), flipped)
    assert learning.statistics(report, center, 0.03)["agreement"] == 0  # and no division by zero


def test_the_strongest_correlation_of_known_features_is_found():
    for strongest in (0.1, 0.4, 0.75, 0.95):
        found = view_correlation(*features(400, rhos=(0.02, strongest, 0.0)))
        assert found == pytest.approx(strongest, abs=0.02)


def test_maps_are_aligned_before_they_are_compared_and_count_where_crops_overlap():
    views, boxes, flipped = maps()
    found = correlation_of([(views, boxes, flipped)])
    assert found == pytest.approx(0.5, abs=0.06)
    assert correlation_of([(views, boxes, torch.zeros_like(flipped))]) < 0.4
    aligned = [inverse_augmentation(x, boxes[:, i], flipped[:, i]) for i, x in enumerate(views)]
    expected = view_correlation(*(rearrange(x, "b c h w -> b (h w) c") for x in aligned))
    assert found == pytest.approx(expected, abs=1e-6)
    boxes[5:9], views[0][5:9] = 0, 1e6
    assert correlation_of([(views, boxes, flipped)]) == pytest.approx(0.5, abs=0.07)
    assert math.isnan(correlation_of([(views, torch.zeros_like(boxes), flipped)]))


@pytest.mark.parametrize("rho, temp_teacher, words", [
    (0.5, 0.03, "0.50, above temp_teacher / temp_student = 0.30: the groups can start"),
    (0.31, 0.03, "late or never; --temp-teacher 0.025 could start"),
    (0.2, 0.03, "will hardly start on these images; --temp-teacher 0.016 could start"),
    (0.5, 0.3, "will hardly start on these images; --temp-teacher 0.04 could start"),
    (0.05, 0.03, "will hardly start on these images; use milder colors"),
    (math.nan, 0.03, "raise --min-area"),
])  # fmt: skip
def test_the_line_of_the_law_names_the_outcome_and_a_way(rho, temp_teacher, words):
    line = law_line(rho, 0.1, temp_teacher)
    assert words in line and len(line) < 200 and "\n" not in line
    if "could start" in line:
        other = float(line.split("--temp-teacher ")[1].split()[0])
        assert "the groups can start" in law_line(rho, 0.1, other)


def watch_of(k=16, warmup=30, total=1000, notes=None):
    c = SimpleNamespace(num_prototypes=k, temp_student=0.1, temp_teacher=0.07)
    return Watch(c, warmup, total, {} if notes is None else notes)


def printed_by(watch, records):
    return [(r["step"], line) for r in records for line in watch.line(r)]


def lines(count=60, every=20, first=0, **other):
    return [record(first + every * i, **other) for i in range(1, count + 1)]


def test_the_law_is_printed_once_from_the_reports_of_the_first_steps(monkeypatch):
    monkeypatch.setattr(learning, "LAW_IMAGES", 12)
    notes, model, printed, first = {}, a_model(), [], []
    watch = watch_of(notes=notes)
    stopped = copy.deepcopy(notes)  # before it is said: a resumed run says it
    for views, boxes, flipped in batches(5, b=4):
        _, report = model(views, boxes, flipped)
        first.append(([view.features for view in report.teacher], boxes, flipped))
        # The report describes the last part of a batch
        geometry = torch.cat([0 * boxes, boxes]), torch.cat([~flipped, flipped])
        printed.append(watch.step(report, *geometry))
    rho = correlation_of(first[:3])
    assert 0.5 < rho <= 1 and rho != correlation_of(first)
    assert printed == [[], [], [f"law      {law_line(rho, 0.1, 0.07)}"], [], []]
    for kept, says in ((stopped, True), (notes, False)):
        resumed = watch_of(notes=kept)
        assert any([resumed.step(report, *geometry) for _ in range(4)]) == says


@pytest.mark.parametrize("name, words, sizes", [
    ("failed_temperatures", "--temp-teacher", (32, 30, 480)),
    ("failed_momentum", "--momentum-teacher", (32, 30, 480)),
    ("failed_backbone", "--arch", (16, 30, 240)),
    ("healthy_toy", "", (32, 30, 1536)),
    ("healthy_toy_k16", "", (16, 30, 1536)),
    ("healthy_photos", "", (24, 80, 3000)),
])  # fmt: skip
def test_a_failed_run_is_warned_of_once_before_its_end_and_a_healthy_one_never(name, words, sizes):
    text = (RECORDED / f"{name}.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    printed = printed_by(watch_of(*sizes), records)
    assert len(printed) == bool(words)
    for step, line in printed:
        assert words in line and line.startswith("warning  ") and step < records[-1]["step"]


UNIFORM, FEW = dict(group_loss=2 * math.log(16)), dict(prototypes_used=2)
USED = lines(3, prototypes_used=16)  # steps 20 to 60
PHASES = [16] * 5 + [3] * 9 + [4] + [3] * 9 + [12] * 20


@pytest.mark.parametrize("watch, records, step, words", [
    # A tenth of the run after the warm-up, or a fifth
    (watch_of(), lines(**UNIFORM), 140, "5.545, where a uniform assignment has 2 ln k"),
    (watch_of(warmup=500), lines(**UNIFORM), 620, "lower --temp-teacher"),
    (watch_of(total=10**5), lines(300, **UNIFORM), 2040, "uniform"),  # a long run
    (watch_of(total=60), lines(every=10, **UNIFORM), 80, "uniform"),  # a short run
    (watch_of(), [*USED, *lines(first=60, **FEW)], 280, "only 2 prototypes are in use"),
    (watch_of(), lines(occupied_per_image=1.2), 140, "1.2 prototypes per image"),
    (watch_of(2048), lines(prototypes_used=90), None, ""),  # never more: not few
    (watch_of(2048), [record(20, prototypes_used=9e2), *lines(prototypes_used=90)], 240, "90"),
    (watch_of(2), lines(prototypes_used=2, group_loss=0.7), None, ""),
    (watch_of(), lines(group_loss=0.97 * 2 * math.log(16)), None, ""),
    (watch_of(), lines(occupied_per_image=1.7), None, ""),
    (watch_of(), [record(20 * i, prototypes_used=n) for i, n in enumerate(PHASES, 1)], None, ""),
    # Of what an earlier sign causes, nothing
    (watch_of(), [*USED, *lines(first=60, occupied_per_image=1.0, **UNIFORM)], 180, "uniform"),
])  # fmt: skip
def test_each_sign_is_printed_once_when_it_has_lasted(watch, records, step, words):
    printed = printed_by(watch, records)
    assert [at for at, _ in printed] == ([step] if step else [])
    assert all(words in line for _, line in printed)


@pytest.mark.parametrize("cut", [2, 6, 20])
def test_a_resumed_run_goes_on_where_it_was_interrupted(cut):
    notes, records = {}, [*USED, *lines(30, first=60, **FEW)]
    first = printed_by(watch_of(notes=notes), records[:cut])
    notes = json.loads(json.dumps(notes))  # as from a checkpoint
    second = printed_by(watch_of(notes=notes), records[cut:])
    assert first + second == printed_by(watch_of(), records) != []
