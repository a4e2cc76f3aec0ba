"""measures/law.py and measures/watch.py: the correlation between two views, and what it forbids."""

import copy
import math

import pytest
import torch
from einops import rearrange
from trained import record

from grouping import inverse_augmentation
from measures import law
from measures.health import Sizes
from measures.watch import Watch
from slotcon import SlotCon

KNOWN = (0.75, 0.5, 0.2, 0.0, 0.0)  # of the five features below


def features(b=40, n=60, rhos=KNOWN, seed=0):
    """Two views (b n c) of places whose feature c correlates by rhos[c]: x1 = r s + e, x2 too."""
    generator = torch.Generator().manual_seed(seed)
    shared, one, two = torch.randn(3, b, n, len(rhos), generator=generator)
    rho = torch.tensor(rhos)
    return tuple(rho.sqrt() * shared + (1 - rho).sqrt() * own for own in (one, two))


def mixing(c=5, seed=1):
    """An invertible map (c c) that is far from a rotation."""
    return torch.randn(c, c, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(c)


# ------------------------------------------------------------------------------ the correlation


def test_the_strongest_correlation_of_known_features_is_found():
    assert law.view_correlation(*features(400)) == pytest.approx(0.75, abs=0.01)
    for strongest in (0.1, 0.4, 0.95):
        found = law.view_correlation(*features(400, rhos=(0.02, strongest, 0.0)))
        assert found == pytest.approx(strongest, abs=0.02)


def test_one_feature_has_the_textbook_correlation():
    first, second = features(b=30, rhos=(0.6,))
    expected = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()
    assert law.view_correlation(first, second) == pytest.approx(expected, abs=0.02)


def test_covariances_are_those_of_a_slow_loop():
    first, second = features(3, 4)
    rows = [rearrange(x, "b n c -> (b n) c") for x in (first, second)]
    within, between = law.covariances(law.double(law.moments(*rows)))
    mean = torch.cat(rows).mean(0)
    slow_within, slow_between = torch.zeros(2, 5, 5, dtype=torch.float64)
    for x1, x2 in zip(*rows):
        x1, x2 = (x1 - mean).double(), (x2 - mean).double()
        slow_within += (torch.outer(x1, x1) + torch.outer(x2, x2)) / (2 * 12)
        slow_between += (torch.outer(x1, x2) + torch.outer(x2, x1)) / (2 * 12)
    assert torch.allclose(within, slow_within, atol=1e-5)
    assert torch.allclose(between, slow_between, atol=1e-5)


def test_linear_maps_shifts_and_the_order_of_views_change_nothing():
    first, second = features()
    rho, m = law.view_correlation(first, second), mixing()
    assert law.view_correlation(first @ m + 3, second @ m + 3) == pytest.approx(rho, abs=5e-3)
    assert law.view_correlation(1e-3 * first, 1e-3 * second) == pytest.approx(rho, abs=1e-4)
    assert law.view_correlation(second, first) == pytest.approx(rho, abs=1e-4)


def test_equal_views_correlate_fully_and_opposite_ones_negatively():
    first, _ = features()
    assert law.view_correlation(first, first) == pytest.approx(1, abs=2e-3)
    assert law.view_correlation(first, -first) < -0.9


def test_views_that_share_nothing_stay_near_zero_although_many_directions_are_searched():
    first, second = features(100, rhos=(0.0,) * 40)
    assert abs(law.view_correlation(first, second)) < 0.1
    flat = [rearrange(x, "b n c -> (b n) c") for x in (first, second)]
    own = law.moments(*flat)
    assert law.correlation_along(law.strongest_direction(law.double(own)), law.double(own)) > 0.05


def test_dead_and_constant_features_do_no_harm():
    first, second = features(200)
    dead = torch.zeros(200, 60, 2)
    dead[..., 1] = 4
    rho = law.view_correlation(torch.cat([first, dead], 2), torch.cat([second, dead], 2))
    assert rho == pytest.approx(0.75, abs=0.02)
    assert math.isfinite(law.view_correlation(dead, dead))


def test_more_features_than_directions_keep_the_strong_ones():
    first, second = features(60, rhos=(0.8, *[0.0] * 99))
    strong = torch.ones(100)
    strong[0] = 3
    assert law.view_correlation(first * strong, second * strong) == pytest.approx(0.8, abs=0.05)


def test_wrong_shapes_are_refused_with_the_numbers_seen():
    first, second = features(4)
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(3, 5\)"):
        law.moments(first[:, 0], second[:3, 0])
    with pytest.raises(ValueError, match="found 1 image"):
        law.view_correlation(first[:1], second[:1])


# ------------------------------------------------------------------------------------- the maps


def maps(b=24, c=3, h=6, w=7, seed=0):
    """Maps (b c h w) of the same scenes with some noise, boxes and flips of whole views."""
    generator = torch.Generator().manual_seed(seed)
    scene, one, two = torch.randn(3, b, c, h, w, generator=generator)
    flipped = torch.rand(b, 2, generator=generator) < 0.5
    views = [
        torch.where(rearrange(flipped[:, i], "b -> b 1 1 1"), (scene + noise).flip(-1),
                    scene + noise)
        for i, noise in enumerate((one, two))
    ]
    return views, torch.tensor([0.0, 0, 1, 1]).expand(b, 2, 4).clone(), flipped


def test_maps_are_aligned_before_they_are_compared():
    (first, second), boxes, flipped = maps()
    found = law.ViewCorrelation(24)
    found.add(first, second, boxes, flipped)
    assert found.done and found.value() == pytest.approx(0.5, abs=0.06)
    found = law.ViewCorrelation(24)
    found.add(first, second, boxes, torch.zeros_like(flipped))
    assert found.value() < 0.4
    aligned = [
        rearrange(inverse_augmentation(x, boxes[:, i], flipped[:, i]), "b c h w -> b (h w) c")
        for i, x in enumerate((first, second))
    ]
    found = law.ViewCorrelation(24)
    found.add(first, second, boxes, flipped)
    assert found.value() == pytest.approx(law.view_correlation(*aligned), abs=1e-6)


@pytest.mark.parametrize("sizes", [(12, 12), (1,) * 24, (7, 3, 14)])
def test_the_split_into_batches_does_not_matter(sizes):
    (first, second), boxes, flipped = maps()
    whole, parts = law.ViewCorrelation(), law.ViewCorrelation()
    whole.add(first, second, boxes, flipped)
    for batch in zip(*(x.split(sizes) for x in (first, second, boxes, flipped))):
        assert not parts.done
        parts.add(*batch)
    assert parts.seen == 24 and parts.value() == pytest.approx(whole.value(), abs=1e-5)


def test_crops_that_do_not_overlap_add_nothing():
    (first, second), boxes, flipped = maps()
    boxes[5:9] = 0
    first[5:9] = 1e6
    found = law.ViewCorrelation()
    found.add(first, second, boxes, flipped)
    assert found.seen == 24 and found.value() == pytest.approx(0.5, abs=0.07)
    nothing = law.ViewCorrelation()
    nothing.add(first, second, torch.zeros_like(boxes), flipped)
    assert math.isnan(nothing.value())


# ---------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    "rho, temp_teacher, starts",
    [(0.5, 0.03, True), (0.5, 0.07, False), (0.31, 0.03, True), (0.29, 0.03, False),
     (0.9, 0.07, True), (-0.2, 0.03, False)],
)
def test_training_starts_where_the_correlation_exceeds_the_ratio(rho, temp_teacher, starts):
    assert law.can_start(rho, 0.1, temp_teacher) == starts
    line = law.verdict_of(rho, 0.1, temp_teacher)
    assert f"views correlate {rho:.2f}" in line and f"= {temp_teacher / 0.1:.2f}" in line
    assert "can start" not in line or starts
    assert "cannot start" not in line or not starts
    assert "\n" not in line and len(line) < 200


@pytest.mark.parametrize("share, starts", [(0.71, False), (0.89, True), (1.2, True)])
def test_a_run_needs_a_little_less_than_the_ratio_since_its_trunk_learns(share, starts):
    assert law.run_can_start(share * 0.3, 0.1, 0.03) == starts
    assert law.can_start(share * 0.3, 0.1, 0.03) == (share > 1)


def test_close_to_the_ratio_the_line_does_not_pretend_to_know():
    assert "late or never" in law.verdict_of(0.31, 0.1, 0.03)
    assert "late or never" in law.verdict_of(0.22, 0.1, 0.03)
    assert "can start" in law.verdict_of(0.34, 0.1, 0.03)
    assert "cannot start" in law.verdict_of(0.20, 0.1, 0.03)


def test_a_temperature_is_named_that_could_start_by_the_same_law():
    assert law.temperature_that_could(0.5, 0.1) == 0.04
    for rho in (0.12, 0.37, 0.5, 0.93):
        other = law.temperature_that_could(rho, 0.1)
        assert f"--temp-teacher {other:g} could" in law.verdict_of(rho, 0.1, 0.3)
        assert "the groups can start" in law.verdict_of(rho, 0.1, other)
        assert 0.7 * rho * 0.1 < other <= 0.8 * rho * 0.1 + 1e-12


def test_where_nothing_correlates_no_temperature_is_named():
    assert "milder colors" in law.verdict_of(0.05, 0.1, 0.03)
    assert "--temp-teacher" not in law.verdict_of(0.05, 0.1, 0.03)
    assert law.temperature_that_could(-0.1, 0.1) == 0
    assert "--min-overlap" in law.verdict_of(math.nan, 0.1, 0.03)


# -------------------------------------------------------------------------------- of a network


def a_model():
    torch.manual_seed(0)
    return SlotCon("tiny", num_prototypes=5, dim_hidden=12, dim_out=6).train()


def batches(count=3, b=4, size=32):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        scene = torch.randn(b, 1, 3, size, size, generator=generator)
        views = scene + 0.1 * torch.randn(b, 2, 3, size, size, generator=generator)
        yield views, torch.tensor([0.0, 0, 1, 1]).expand(b, 2, 4), torch.zeros(b, 2).bool()


def test_measuring_a_network_changes_nothing_of_it():
    model = a_model().eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    rho = law.measure(model.teacher, batches())
    assert 0.5 < rho <= 1
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.teacher.training and all(p.grad is None for p in model.parameters())


def test_the_reports_of_ordinary_steps_give_what_a_measurement_gives():
    model, found = a_model(), law.ViewCorrelation(12)
    for views, boxes, flipped in batches():
        _, report = model(views, boxes, flipped)
        found.add_step(report, boxes, flipped)
    expected = law.measure(a_model().teacher, batches())
    assert found.done and found.value() == pytest.approx(expected, abs=1e-5)


def test_of_a_batch_in_parts_the_last_part_is_compared():
    model, found, alone = a_model(), law.ViewCorrelation(), law.ViewCorrelation()
    (views, boxes, flipped), = batches(1, b=6)
    flipped = torch.tensor([[True, False]] * 3 + [[False, False]] * 3)
    _, report = model(views[3:], boxes[3:], flipped[3:])
    found.add_step(report, boxes, flipped)
    alone.add_step(report, boxes[3:], flipped[3:])
    assert found.seen == 3 and found.value() == alone.value()


# -------------------------------------------------------------------------------------- a watch

SIZES = Sizes(num_prototypes=16, warmup_steps=0, total_steps=100, cells=64)


def test_the_law_is_said_once_and_only_of_a_fresh_run():
    fresh, resumed = (Watch(SIZES, 0.1, 0.07, {}, fresh=x) for x in (True, False))
    fresh.correlation.enough = 12
    model, said = a_model(), []
    for views, boxes, flipped in batches(5):
        _, report = model(views, boxes, flipped)
        said.append(fresh.first_steps(report, boxes, flipped))
        assert resumed.first_steps(report, boxes, flipped) == []
    assert [len(lines) for lines in said] == [0, 0, 1, 0, 0]
    assert said[2][0].startswith("law      views correlate")


def test_a_sign_is_said_once_in_a_run_that_was_resumed_too():
    notes, bad = {}, [record(10 * i, group_loss=5.6) for i in range(1, 15)]
    first = Watch(SIZES, 0.1, 0.07, notes, fresh=True)
    said = [line for r in bad for line in first.line_of_log(r)]
    assert len(said) == 1 and said[0].startswith("warning  the group loss")
    assert notes == dict(warned=["uniform"])
    again = Watch(SIZES, 0.1, 0.07, notes, fresh=False)
    assert [line for r in bad for line in again.line_of_log(r)] == []
