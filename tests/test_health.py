"""measures/health.py: what a log shows to be wrong, on recorded logs and line by line.

tests/recorded/README.md has the commands that made the logs.
"""

import json
import math
from pathlib import Path

import pytest
from trained import record

from measures.health import SIGNS, Sizes, lasting_lines, warnings

RECORDED = Path(__file__).parent / "recorded"
SIZES = {
    "failed_temperatures": Sizes(16, 30, 384, 144),
    "failed_momentum": Sizes(16, 30, 480, 144),
    "failed_trunk": Sizes(16, 30, 240, 4),
    "healthy_toy": Sizes(16, 30, 1728, 144),
    "healthy_toy_k24_seed0": Sizes(24, 30, 1728, 144),
    "healthy_toy_k24_seed3": Sizes(24, 30, 1728, 144),
    "healthy_photos_k24": Sizes(24, 80, 900, 64),
    "healthy_photos_k32": Sizes(32, 40, 800, 64),
}
SMALL = Sizes(num_prototypes=16, warmup_steps=30, total_steps=1000, cells=144)


def read(name):
    return [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]


def said_by(records, sizes):
    """Everything that is said while the lines come in: (step, name, line)."""
    found = []
    for i, last in enumerate(records, start=1):
        new = warnings(records[:i], sizes, [name for _, name, _ in found])
        found += [(last["step"], name, line) for name, line in new.items()]
    return found


def lines(count=60, every=20, **other):
    return [record(every * i, **other) for i in range(1, count + 1)]


# -------------------------------------------------------------------------------- recorded logs


@pytest.mark.parametrize(
    "name, sign, option",
    [
        ("failed_temperatures", "uniform", "--temp-teacher"),
        ("failed_momentum", "few", "--momentum-teacher 0.9"),
        ("failed_trunk", "few", "--arch"),
    ],
)
def test_a_failure_is_said_once_with_its_cause(name, sign, option):
    records = read(name)
    (step, found, line), = said_by(records, SIZES[name])
    assert found == sign and option in line
    assert step < records[-1]["step"]  # before the end
    assert len(line) < 200 and "\n" not in line


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("healthy")])
def test_nothing_is_said_of_a_healthy_run(name):
    assert said_by(read(name), SIZES[name]) == []


def test_every_recorded_log_is_read():
    assert {path.stem for path in RECORDED.glob("*.jsonl")} == SIZES.keys()


# ------------------------------------------------------------------------------------ each sign


def test_uniform_is_said_once_the_warm_up_is_over():
    (step, name, line), = said_by(lines(group_loss=2 * math.log(16)), SMALL)
    assert name == "uniform" and "5.545" in line and "lower --temp-teacher" in line
    assert step == 140  # 100 steps are a tenth of the run, and begin after step 30
    late = said_by(lines(group_loss=2 * math.log(16)), SMALL._replace(warmup_steps=500))
    assert late[0][0] == 620


def test_a_group_loss_that_has_left_the_uniform_value_is_fine():
    assert said_by(lines(group_loss=0.97 * 2 * math.log(16)), SMALL) == []


def test_few_prototypes_name_the_cause_that_the_run_shows():
    before = lines(3, prototypes_used=16)

    def line_of(sizes=SMALL, **other):
        later = [r for r in lines(prototypes_used=2, **other) if r["step"] > 60]
        (step, name, line), = said_by(before + later, sizes)
        assert name == "few" and "only 2 of 16" in line
        assert step == 280  # 200 steps after the line of step 80, since phases pass
        return line

    assert "lower --momentum-center" in line_of()
    assert "--momentum-teacher 0.9 is low" in line_of(momentum_teacher=0.9)
    assert "only 4 cells" in line_of(SMALL._replace(cells=4), momentum_teacher=0.9)


def test_a_phase_with_few_prototypes_is_not_a_failure():
    used = [16] * 5 + [3] * 9 + [4] + [3] * 9 + [12] * 20
    records = [record(20 * i, prototypes_used=n) for i, n in enumerate(used, start=1)]
    assert said_by(records, SMALL) == []


def test_few_is_measured_against_what_was_in_use_before():
    large = SMALL._replace(num_prototypes=2048)
    assert said_by(lines(prototypes_used=90, agreement=0.5, group_loss=5.0), large) == []
    records = lines(4, prototypes_used=1600, group_loss=5.0)
    records += [r for r in lines(prototypes_used=150, group_loss=5.0) if r["step"] > 80]
    assert [name for _, name, _ in said_by(records, large)] == ["few"]


def test_two_prototypes_in_all_are_not_few():
    two = SMALL._replace(num_prototypes=2)
    assert said_by(lines(prototypes_used=2, group_loss=0.7, agreement=0.9), two) == []


def test_one_prototype_per_image_names_the_trunk():
    (_, name, line), = said_by(lines(occupied_per_image=1.2, prototypes_used=12), SMALL)
    assert name == "alone" and "--arch" in line and "1.2 prototypes per image" in line
    assert said_by(lines(occupied_per_image=1.7, prototypes_used=12), SMALL) == []


def test_agreement_at_chance_names_the_views():
    (_, name, line), = said_by(lines(agreement=0.08), SMALL)
    assert name == "chance" and "8%" in line and "6%" in line and "--min-area" in line
    assert said_by(lines(agreement=0.2), SMALL) == []


def test_what_follows_from_an_earlier_sign_is_not_said():
    all_of_it = dict(group_loss=5.55, prototypes_used=9, occupied_per_image=1.0, agreement=0.06)
    assert [name for _, name, _ in said_by(lines(**all_of_it), SMALL)] == ["uniform"]
    assert warnings(lines(**all_of_it), SMALL, ["uniform"]) == {}


def test_a_second_failure_of_one_run_is_said_too():
    records = lines(20, group_loss=5.55)
    records += [r for r in lines(60, agreement=0.05) if r["step"] > 400]
    assert [name for _, name, _ in said_by(records, SMALL)] == ["uniform", "chance"]


# -------------------------------------------------------------------------------- lasting lines


def test_lines_reach_back_a_tenth_of_the_run_and_never_into_the_warm_up():
    records = lines(20)
    assert [r["step"] for r in lasting_lines(records, SMALL)] == [300, 320, 340, 360, 380, 400]
    assert lasting_lines(records[:6], SMALL) == []  # step 20 lies in the warm-up
    assert lasting_lines(records[:7], SMALL)[0]["step"] == 40


def test_rare_lines_of_the_log_still_count_at_least_five():
    records = lines(8, every=200)
    assert [r["step"] for r in lasting_lines(records, SMALL)] == [800, 1000, 1200, 1400, 1600]
    assert lasting_lines(records[:4], SMALL) == [] and lasting_lines([], SMALL) == []


def test_a_long_run_is_told_within_two_thousand_steps():
    long = SMALL._replace(total_steps=100_000)
    found = lasting_lines(lines(500, every=100), long, lasting=0.2)
    assert found[0]["step"] == 48_000 and len(found) == 21


def test_names_of_signs_differ():
    assert len({sign.name for sign in SIGNS}) == len(SIGNS)
