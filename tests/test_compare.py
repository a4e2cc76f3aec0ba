"""compare.py: which rows, how long each may train, what is measured and what is written.

Promised: every row has the same seconds, and the whole command its minutes; the measures are the
same for all, by definition; what a row did stands in comparison.json under its file's name as soon
as it is done.
"""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import compare
import comparisons
import recipes
import train
from comparisons.bench import STARTING, Bench, seconds_each
from comparisons.common import Outcome, System
from comparisons.learn import Budget, learn
from comparisons.scenes import Scenes
from data import TwoCrops
from engine.schedule import warm_up
from measures import metrics, systems
from measures.comparison_image import save_comparison
from measures.labels import UNSEEN

N, Y, X, T = 3, 8, 12, 4
# What all rows share: train.py's toy recipe, but for its new starts
ONE_START = recipes.dataclasses.replace(recipes.PRESETS["toy"], group_starts=1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ rows


def test_without_options_every_system_has_its_rows_and_names_agree_with_files():
    entries = compare.entries_of(compare.parse([]))
    names = list(dict.fromkeys(entry.name for entry in entries))
    files = {path.stem for path in Path(comparisons.__file__).parent.glob("*.py")}
    assert names == list(comparisons.SYSTEMS) and set(names) <= files
    assert files - set(names) == {"__init__", "bench", "common", "learn", "scenes"}
    assert [e.label for e in entries if e.name == "given_masks"] == [
        "given_masks: grid",
        "given_masks: color",
        "given_masks: truth",
    ]
    assert [e.preset for e in entries if e.name == "slot_attention"] == ["scene", "flat"]
    toy = recipes.dataclasses.asdict(ONE_START)
    assert all({**e.settings, "output_dir": ""} == toy for e in entries)


def test_only_names_systems_and_table_names_rows():
    entries = compare.entries_of(compare.parse(["--only", "motion", "moco"]))
    assert [entry.label for entry in entries] == ["motion", "moco"]
    for line in (
        ["--only", "mocov3"],
        ["--table", "9z"],
        ["--only", "moco", "--table", "6a"],
        ["--minutes", "0"],
        ["--minutes", "-1"],
        ["--minutes", "5", "--steps", "3"],
        ["--seeds", "0"],
    ):
        with pytest.raises(ValueError):
            compare.parse(line)


@pytest.mark.parametrize("table", recipes.TABLES)
def test_every_row_of_every_table_is_a_system_that_can_be_built(table):
    entries = compare.entries_of(compare.parse(["--table", table]))
    rows = recipes.TABLES[table][1]
    assert [entry.label for entry in entries] == [row.label for row in rows] and len(rows) >= 2
    assert sum(row.default for row in rows) == 1
    default = next(e for e, row in zip(entries, rows) if row.default)
    toy = recipes.dataclasses.asdict(ONE_START)
    assert {**default.settings, "output_dir": ""} == toy  # the gray row is the preset, but for that
    for entry, row in zip(entries, rows):
        assert entry.build(0).forward
        if not row.default:
            assert entry.settings != default.settings or entry.arguments, row.label
        assert recipes.command(row).startswith(
            "python compare.py" if row.arguments else "python train.py"
        )


def test_the_tables_do_what_their_rows_say():
    def row(table, label):
        return next(
            e for e in compare.entries_of(compare.parse(["--table", table])) if e.label == label
        )

    assert row("6b", "1.0").build(0).method.predictor is None  # the slot loss is skipped
    assert row("6b", "0.5").build(0).method.predictor is not None
    assert row("collapse", "no center").settings["momentum_center"] == 1  # it stays at zero
    no_sharpening = row("collapse", "no sharpening").settings
    assert no_sharpening["temp_teacher"] == no_sharpening["temp_student"]
    assert not row("collapse", "no stop-gradient").build(0).stop_gradient
    assert row("collapse", "no center").build(0).stop_gradient
    average = row("collapse", "no moving average").settings
    assert average["momentum_teacher"] == average["momentum_teacher_end"] == 0
    assert (
        row("8e", "without").settings["geometric"] is False
        and row("8d", "512, with").build(0).method.image_loss
    )
    assert row("8b", "Reg.").build(0).method.slot_loss == "reg"
    assert row("8c", "Proj.").build(0).method.where_aligned == "proj"
    counts = [
        e.build(0).method.student.prototypes.num_embeddings
        for e in compare.entries_of(compare.parse(["--table", "6a"]))
    ]
    assert counts == sorted(set(counts))


# ------------------------------------------------------------------------------------------ time


def test_a_budget_is_of_seconds_or_of_steps():
    steps = Budget(steps=4)
    assert [steps.used(step) for step in (0, 1, 4)] == [0, 0.25, 1]
    seconds = Budget(seconds=50)
    seconds.began = time.perf_counter() - 25
    assert seconds.used(1000) == pytest.approx(0.5, abs=0.01)
    for wrong in (dict(), dict(seconds=1, steps=1)):
        with pytest.raises(ValueError, match="of seconds or of steps"):
            Budget(**wrong)


def test_what_is_left_of_the_minutes_is_shared_equally():
    judging = {"a": 2.0, "b": 3.0}
    found = seconds_each(10, 3, ["a", "b", "a"], judging, spent=20.0, prepared=7.0)
    overhead = 20 + 2 * 7 + 5 + 3 * (1.5 * (2 + 3 + 2) + 3 * STARTING)
    assert found == pytest.approx((600 - overhead) / 9)
    with pytest.raises(
        ValueError, match=r"1 minutes leave no second of training to each of 3 rows and 3 seed\(s\)"
    ):
        seconds_each(1, 3, ["a", "b", "a"], judging, spent=20.0, prepared=7.0)
    with pytest.raises(ValueError, match=r": 1\.5 would"):
        seconds_each(1, 3, ["a", "b", "a"], judging, spent=20.0, prepared=7.0)
    assert seconds_each(1.5, 3, ["a", "b", "a"], judging, spent=20.0, prepared=7.0) >= 1


class Quick(Bench):
    """It judges in no time."""

    def judge(self, system, entry):
        return {"nmi": 0.0}, None


def test_scenes_are_drawn_once_and_what_is_untrained_is_judged_once_per_kind():
    args = compare.parse(["--only", "moco", "dense", "slotcon", "motion"])
    entries, drawn = compare.entries_of(args), []
    bench = Quick(4, 2, draw=lambda *key: drawn.append(key) or Scenes(*key))
    bench.prepare(entries, 0)
    assert len(drawn) == len(set(drawn)) == 6 and drawn[0] == (0, 4, "image", "", "scene")
    assert len(bench.untrained) == 3  # clusters of image features, prototypes, slots of flow
    bench.prepare(entries, 1)
    assert len(drawn) == 8 and {key[0] for key in bench.drawn} == {1, UNSEEN, UNSEEN + 1}


class Still(System):
    """A system whose loss is what it is told to be; it counts what it is asked."""

    def __init__(self, losses=(1.0,)):
        super().__init__()
        self.layer, self.losses, self.asked, self.moved = (
            nn.Linear(1, 1),
            itertools.cycle(losses),
            [],
            [],
        )
        self.seen = nn.BatchNorm1d(1)

    def forward(self, views, boxes, flipped, told):
        self.asked.append((views, told))
        self.seen(random(5, 1))
        loss = self.layer.weight.sum() ** 2 * next(self.losses)
        return loss, Outcome(loss.detach(), "memo")

    def after_step(self, memo, momentum):
        self.moved.append((memo, momentum))


SETTINGS = {
    **recipes.dataclasses.asdict(ONE_START),
    "workers": 0,
    "batch_size": 2,
    "seed": 4,
}


def taught(system, folder, scenes=None, crops=None, **budget):
    toy = recipes.PRESETS["toy"]
    return learn(
        system,
        scenes or Scenes(0, 5),
        crops or recipes.crops_of(toy),
        recipes.photometric_of(toy),
        SETTINGS,
        Budget(**budget),
        folder,
    )


def test_learning_by_steps_takes_so_many_and_lets_the_rest_follow(tmp_path):
    system = Still()
    found = taught(system, tmp_path, Scenes(0, 5, told="depth"), steps=6)
    assert found["steps"] == 6 == len(system.asked) == len(system.moved) and found["bad_steps"] == 0
    views, told = system.asked[0]
    side = SETTINGS["image_size"]
    assert views.shape == (2, 2, 3, side, side) and told.shape == (2, 2, 1, side, side)
    assert told.min() >= 0 and told.max() <= 1 and views.min() < 0
    assert all(memo == "memo" and 0.98 < momentum <= 1 for memo, momentum in system.moved)


def test_learning_by_the_clock_ends_when_the_seconds_are_used_up(tmp_path):
    system = Still()
    found = taught(system, tmp_path, seconds=0.5)
    assert 0.5 <= found["seconds"] < 1.5 and found["steps"] == len(system.moved) > 1


def test_the_same_seed_shows_the_same_views_to_every_system(tmp_path):
    first, second = Still(), Still()
    for system in (first, second):
        taught(system, tmp_path, steps=3)
    assert all(one[0].equal(other[0]) for one, other in zip(first.asked, second.asked))
    assert not first.asked[0][0].equal(first.asked[1][0])


def test_a_bad_step_changes_nothing_and_twenty_end_the_run(tmp_path):
    system = Still([math.nan, 1.0])
    found = taught(system, tmp_path, steps=2)
    assert found == dict(found, steps=2, bad_steps=2) and len(system.moved) == 2
    assert system.seen.num_batches_tracked == 2 and system.layer.weight.isfinite().all()
    with pytest.raises(ValueError, match="no finite loss in 20 steps"):
        taught(Still([math.nan]), tmp_path, steps=2)


def test_flow_is_not_jittered(tmp_path):
    system = Still()
    system.sees = "flow"
    scenes = Scenes(0, 5, sees="flow")
    taught(system, tmp_path, scenes, TwoCrops(16, geometric=False), steps=1)
    views = system.asked[0][0]
    assert views[:, 0].equal(views[:, 1])  # the same crop: only colors could differ


# ----------------------------------------------------------------------------------------- measures


class Colors(nn.Module):
    """A trunk that knows the color of every pixel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images * self.scale


def painted(seed=0):
    """Scenes of plain colors: the class is the color, one object per class above 1."""
    semantic = torch.randint(T, (N, Y // 4, X // 4), generator=torch.Generator().manual_seed(seed))
    semantic = semantic.repeat_interleave(4, 1).repeat_interleave(4, 2).byte()
    colors = torch.tensor(
        [[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 250]], dtype=torch.uint8
    )
    instance = torch.where(semantic > 1, semantic - 1, 0)
    return systems.Truth(colors[semantic.long()].permute(0, 3, 1, 2), semantic, semantic, instance)


def test_a_trunk_that_knows_the_colors_is_perfect_on_scenes_of_plain_colors():
    found, groups = systems.judge(Colors(), lambda images: None, False, painted(), painted(1), T, T)
    assert found["named_by"] == found["grouped_by"] == systems.CLUSTERS
    assert [found[key] for key in systems.MEASURES] == pytest.approx([1] * 6)
    assert groups.shape == (N, Y, X) and found["groups_used"] == T


def test_groups_with_names_are_judged_themselves_and_slots_by_clusters():
    truth = painted()

    def one_group(images):
        return images[:, :2] * 0 + torch.tensor([1.0, 0.0])[:, None, None]

    found, groups = systems.judge(Colors(), one_group, False, truth, painted(1), T, T)
    assert found["named_by"] == found["grouped_by"] == systems.OWN and not groups.any()
    assert found["nmi"] == 0 and found["ari_classes"] == 0 and found["groups_used"] == 1
    slots, _ = systems.judge(Colors(), one_group, True, truth, painted(1), T, T)
    assert slots["named_by"] == systems.CLUSTERS and slots["grouped_by"] == systems.OWN
    assert (
        slots["nmi"] > 0.5
        and slots["ari_classes"] == 0
        and slots["probe_miou"] == found["probe_miou"]
    )


def test_the_rand_index_is_the_mean_over_scenes_of_the_pixels_that_count():
    groups, truth = random(N, Y, X).gt(0).long(), random(N, Y, X, seed=1).gt(0).byte()
    counted = random(N, Y, X, seed=2) > 0
    counted[1] = False

    def slow(a, b):
        pairs = list(itertools.combinations(range(len(a)), 2))
        both = sum(a[i] == a[j] and b[i] == b[j] for i, j in pairs)
        one, other = sum(a[i] == a[j] for i, j in pairs), sum(b[i] == b[j] for i, j in pairs)
        expected = one * other / len(pairs)
        return (both - expected) / ((one + other) / 2 - expected)

    lists = [(groups[i][counted[i]].tolist(), truth[i][counted[i]].tolist()) for i in (0, 2)]
    assert systems.rand_index(groups, truth, counted) == pytest.approx(
        sum(slow(*pair) for pair in lists) / 2
    )
    assert systems.rand_index(truth.long(), truth) == 1


def test_clusters_are_the_nearest_center_by_direction():
    features = torch.zeros(N, 2, 4, 5)
    features[:, 0, :, :2], features[:, 1, :, 2:] = (
        3.0,
        torch.rand(N, 4, 3) + 0.1,
    )  # two directions, any length
    owner = systems.cluster_maps(features, 2).argmax(1)
    assert (
        owner[:, :, :2].unique().numel() == owner[:, :, 2:].unique().numel() == 1
        and owner.unique().numel() == 2
    )


def test_agreement_is_that_of_metrics():
    groups, semantic = random(N, Y, X).gt(0).long(), random(N, Y, X, seed=1).gt(0).long()
    counts = metrics.confusion_matrix(groups, semantic, 2, 2)
    found = systems.agreement(groups, semantic, 2)
    assert found == dict(miou=metrics.miou(counts, metrics.match(counts)), nmi=metrics.nmi(counts))


@pytest.mark.parametrize(
    "used, nmi, gone", [(3, 0.5, True), (4, 0.5, False), (16, 0.1, True), (16, 0.2, True)]
)
def test_a_collapse_is_few_groups_or_no_more_than_the_untrained_network_knows(used, nmi, gone):
    assert systems.collapsed(dict(groups_used=used, nmi=nmi), dict(nmi=0.2)) is gone


def test_groups_in_use_are_counted_in_all_scenes_or_in_the_richest_one():
    groups = torch.tensor([[[0, 1]], [[2, 2]]])
    assert (
        systems.groups_in_use(groups, per_image=False) == 3
        and systems.groups_in_use(groups, per_image=True) == 2
    )


def test_the_table_has_medians_stars_and_collapses():
    def record(miou, **more):
        return dict(
            named_by=systems.OWN, grouped_by=systems.OWN, miou=miou, nmi=0.5, steps=7, **more
        )

    table = systems.format_table(
        {
            "ours": [record(0.1, collapsed=True), record(0.3), record(0.4)],
            "theirs": [dict(record(0.2), named_by=systems.CLUSTERS)],
        }
    )
    ours, theirs = table.splitlines()[1:3]
    assert ours.startswith("ours") and " 0.300 " in ours and ours.endswith("1 of 3")
    assert " 0.200*" in theirs and theirs.endswith("no")


# -------------------------------------------------------------------------------- the whole command


def test_one_image_has_a_row_per_system_and_a_column_per_scene(tmp_path):
    from PIL import Image

    truth = painted()
    sizes = []
    for rows in (
        {"a": truth.semantic.long()},
        {"a": truth.semantic.long(), "b": truth.semantic.long() + 20},
    ):
        save_comparison(
            tmp_path / "image.png", truth.seen, truth.semantic, truth.regions, rows, "title"
        )
        sizes.append(Image.open(tmp_path / "image.png").size)
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1]


def test_from_the_command_line_to_the_file(tmp_path, monkeypatch, capsys):
    small = recipes.dataclasses.replace(recipes.PRESETS["toy"], toy_scenes=32, workers=0)
    monkeypatch.setitem(recipes.PRESETS, "toy", small)
    options = "--only moco slot_attention --steps 2 --scenes 8 --output-dir".split()
    assert compare.main([*options, str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    assert list(found["systems"]) == ["moco", "slot_attention"]
    assert [r["variant"] for r in found["systems"]["slot_attention"]] == ["scene", "flat"]
    for record in itertools.chain(*found["systems"].values()):
        assert record["steps"] == 2 and isinstance(record["collapsed"], bool)
        assert all(-1 <= record[key] <= 1 for key in systems.MEASURES)
    assert "slot_attention: flat" in capsys.readouterr().out


def test_the_file_has_every_seed_under_its_system_or_under_its_row_of_the_table(tmp_path):
    records = [dict(system="slotcon", seed=seed) for seed in (0, 1)]
    for options, key in ((["--only", "slotcon"], "slotcon"), (["--table", "6a"], "K = 8")):
        args = compare.parse([*options, "--output-dir", str(tmp_path)])
        compare.write(args, {"K = 8": records}, 1.5, 60.0)
        found = json.loads((tmp_path / "comparison.json").read_text())
        assert found["systems"] == {key: records} and found["training_seconds_each"] == 1.5


def test_slotcon_here_is_train_py_weight_for_weight(tmp_path):
    """Same seed, batches, colors, schedules, optimizer, center and teacher: four steps of both."""
    small = [
        "--toy-scenes",
        "32",
        "--epochs",
        "2",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--toy-test-scenes",
        "8",
        "--seed",
        "5",
        "--momentum-teacher-end",
        "1.0",
        "--warmup-epochs",
        "0.5",
        "--temp-teacher-start",
        "0.01",
        "--temp-teacher-epochs",
        "1",
        "--group-starts",
        "1",
    ]
    train.main([*small, "--output-dir", str(tmp_path)])
    expected = torch.load(tmp_path / "last.pth", weights_only=False)["model"]
    c, _ = recipes.parse(["--preset", "toy", *small], "")
    entry = compare.entries_of(compare.parse(["--only", "slotcon"]))[0]
    entry = entry._replace(settings=recipes.dataclasses.asdict(c))
    system = entry.build(5)
    learn(
        system,
        Scenes(5, 32),
        entry.crops,
        entry.photometric,
        entry.settings,
        Budget(steps=4),
        tmp_path,
    )
    found = system.method.state_dict()
    assert found.keys() == expected.keys() and not expected["center"].eq(0).all()
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7), name


def test_a_warm_up_is_a_straight_line_and_off_without_steps():
    assert [warm_up(step, 4, 0.02, 0.06) for step in (0, 1, 3, 4, 9)] == pytest.approx(
        [0.02, 0.03, 0.05, 0.06, 0.06]
    )
    assert warm_up(0, 0, 0.02, 0.06) == 0.06


def test_judging_does_not_depend_on_training_order(tmp_path):
    """What one system draws at random does not reach the next one."""
    entry = compare.entries_of(compare.parse(["--only", "moco"]))[0]
    weights = []
    for _ in range(2):
        weights.append(entry.build(3).trunk[0].weight.clone())
        torch.rand(7)
    assert weights[0].equal(weights[1])


@pytest.mark.slow
def test_minutes_are_kept_and_every_row_has_the_same_seconds(tmp_path):
    began = time.perf_counter()
    options = "--only moco slotcon kmeans --minutes 1.5 --scenes 32 --output-dir".split()
    assert compare.main([*options, str(tmp_path)]) == 0
    assert time.perf_counter() - began < 1.1 * 90
    found = json.loads((tmp_path / "comparison.json").read_text())
    seconds = [r["seconds"] for records in found["systems"].values() for r in records]
    assert len(seconds) == 3 and max(seconds) - min(seconds) < 2.5 and min(seconds) > 2
