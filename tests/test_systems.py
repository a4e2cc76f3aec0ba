"""measures/systems.py: the measures of every system that compare.py runs."""

import pytest
import torch

from measures import metrics, systems

N, T, Y, X = 3, 4, 12, 20


class Colors(torch.nn.Module):
    """A backbone that knows the color of every pixel."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images * self.scale


def painted(seed=0):
    """Scenes of plain colors: the class is the color, one object per class above 1."""
    semantic = torch.randint(T, (N, Y // 4, X // 4), generator=torch.Generator().manual_seed(seed))
    semantic = semantic.repeat_interleave(4, 1).repeat_interleave(4, 2).byte()
    colors = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 250]]).byte()
    instance = torch.where(semantic > 1, semantic - 1, 0)
    return systems.Truth(colors[semantic.long()].permute(0, 3, 1, 2), semantic, semantic, instance)


def test_a_backbone_that_knows_the_colors_is_perfect_on_scenes_of_plain_colors():
    found, groups = systems.judge(Colors(), lambda images: None, False, painted(), painted(1), T, T)
    assert found["named_by"] == found["grouped_by"] == systems.CLUSTERS
    assert [found[key] for key in list(systems.MEASURES)[:6]] == pytest.approx([1] * 6)
    foreground = systems.rand_index(painted().semantic.long(), painted().instance > 0)
    assert found["ari_foreground"] == pytest.approx(foreground)
    assert groups.shape == (N, Y, X) and found["groups_used"] == T
    assert not systems.without_names(found)


def test_groups_with_names_are_judged_themselves_and_slots_by_clusters():
    def one_group(images):
        return images[:, :2] * 0 + torch.tensor([1.0, 0.0])[:, None, None]

    parts = painted(), painted(1), T, T
    found, groups = systems.judge(Colors(), one_group, False, *parts)
    assert found["named_by"] == found["grouped_by"] == systems.OWN and not groups.any()
    assert found["nmi"] == 0 and found["ari_classes"] == 0 and found["groups_used"] == 1
    slots, _ = systems.judge(Colors(), one_group, True, *parts)
    assert slots["named_by"] == systems.CLUSTERS and slots["grouped_by"] == systems.OWN
    assert slots["nmi"] > 0.5 and slots["ari_classes"] == 0
    assert systems.without_names(slots) and not systems.without_names(found)
    assert slots["probe_miou"] == found["probe_miou"]


def test_the_rand_index_is_the_mean_over_scenes_of_the_pixels_that_count():
    groups, truth = torch.randint(2, (N, 6, 7)), torch.randint(2, (N, 6, 7)).byte()
    counted = torch.rand(N, 6, 7) > 0.5
    counted[1] = False
    each = []
    for i in (0, 2):
        one, other = groups[i][counted[i]], truth[i][counted[i]]
        each.append(metrics.adjusted_rand_index(metrics.confusion_matrix(one, other, 2, 2)))
    assert systems.rand_index(groups, truth, counted) == pytest.approx(sum(each) / 2)
    assert systems.rand_index(truth.long(), truth) == 1


@pytest.mark.parametrize("used, nmi, gone", [(3, 0.5, True), (4, 0.5, False), (16, 0.2, True)])
def test_a_collapse_is_few_groups_or_no_more_than_the_untrained_network_knows(used, nmi, gone):
    assert systems.collapsed(dict(groups_used=used, nmi=nmi), dict(nmi=0.2)) is gone


def test_the_table_has_medians_stars_and_collapses():
    usual = dict.fromkeys([*systems.MEASURES, *systems.COUNTS], 0.5)
    usual |= dict(named_by=systems.OWN, grouped_by=systems.OWN, collapsed=False)
    record = lambda miou, **more: {**usual, "miou": miou, **more}
    rows = {"ours": [record(0.1, collapsed=True), record(0.3), record(0.4)],
            "theirs": [record(0.2, named_by=systems.CLUSTERS)]}  # fmt: skip
    ours, theirs = systems.format_table(rows).splitlines()[1:3]
    assert ours.startswith("ours") and " 0.300 " in ours and ours.endswith("1 of 3")
    assert " 0.200*" in theirs and theirs.endswith("0 of 1")
