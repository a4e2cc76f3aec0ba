"""comparisons/judge.py: the measures of every system that compare.py runs."""

from types import SimpleNamespace

import pytest
import torch

from comparisons import judge
from comparisons.common import System
from measures import metrics

N, T, Y, X = 3, 4, 12, 20


class Colors(System):
    """A system whose backbone knows the color of every pixel. maps: of its groups."""

    def __init__(self, maps=lambda images: None, per_image=False):
        super().__init__()
        self.maps, self.per_image, self.judged = maps, per_image, "network"
        self.network = torch.nn.Module()
        self.network.backbone = torch.nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.network.backbone.weight.data.fill_(1)


def painted(seed=0):
    """Scenes of plain colors: the class is the color, one object per class above 1."""
    semantic = torch.randint(T, (N, Y // 4, X // 4), generator=torch.Generator().manual_seed(seed))
    semantic = semantic.repeat_interleave(4, 1).repeat_interleave(4, 2).byte()
    colors = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 250]]).byte()
    images, instance = colors[semantic.long()].permute(0, 3, 1, 2), (semantic.int() - 1).clamp(0)
    return SimpleNamespace(images=images, semantic=semantic, regions=semantic, instance=instance)


def test_a_backbone_that_knows_the_colors_is_perfect_on_scenes_of_plain_colors():
    found, groups = judge.judge(Colors(), painted(), painted(1), T)
    assert found["named_by"] == found["grouped_by"] == judge.CLUSTERS
    assert [found[key] for key in list(judge.MEASURES)[:5]] == pytest.approx([1] * 5)
    foreground = metrics.rand_index(painted().semantic.long(), painted().instance > 0)
    assert found["ari_foreground"] == pytest.approx(foreground)
    assert groups.shape == (N, Y, X) and found["groups_used"] == T


def test_groups_with_names_are_judged_themselves_and_slots_by_clusters():
    def one_group(images):
        return images[:, :2] * 0 + torch.tensor([1.0, 0.0])[:, None, None]

    found, groups = judge.judge(Colors(one_group), painted(), painted(1), T)
    assert found["named_by"] == found["grouped_by"] == judge.OWN and not groups.any()
    assert found["nmi"] == 0 and found["ari_instances"] == 0 and found["groups_used"] == 1
    slots, _ = judge.judge(Colors(one_group, per_image=True), painted(), painted(1), T)
    assert slots["named_by"] == judge.CLUSTERS and slots["grouped_by"] == judge.OWN
    assert slots["nmi"] > 0.5 and slots["ari_instances"] == 0
    assert slots["probe_miou"] == found["probe_miou"]


@pytest.mark.parametrize("used, nmi, gone", [(3, 0.5, True), (4, 0.5, False), (16, 0.2, True)])
def test_a_collapse_is_few_groups_or_no_more_than_the_untrained_network_knows(used, nmi, gone):
    found = dict(groups_used=used, nmi=nmi, named_by=judge.OWN, grouped_by=judge.OWN)
    assert judge.collapsed(found, dict(nmi=0.2)) is gone
    of_slots = dict(found, named_by=judge.CLUSTERS)  # whose NMI is not theirs
    assert judge.collapsed(of_slots, dict(nmi=0.2)) is (used < 4)


def test_the_table_has_medians_stars_and_collapses():
    usual = dict.fromkeys([*judge.MEASURES, "groups_used"], 0.5)
    usual |= dict(named_by=judge.OWN, grouped_by=judge.OWN, collapsed=False)
    record = lambda miou, **more: {**usual, "miou": miou, **more}
    rows = {"ours": [record(0.1, collapsed=True), record(0.3), record(0.4)],
            "theirs": [record(0.2, named_by=judge.CLUSTERS)]}  # fmt: skip
    ours, theirs = judge.format_table(rows).splitlines()[1:3]
    assert ours.startswith("ours") and " 0.300 " in ours and ours.endswith("1 of 3 collapsed")
    assert " 0.200*" in theirs and "collapsed" not in theirs
