"""segments.py: what a trained network makes of pictures, and the best segments of every prototype."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from grouping import GroupingNetwork
from measures import segments
from measures.labels import ToyScenes

B, K, H, W = 3, 7, 4, 5


def random_maps(b=B, k=K, seed=0):
    return torch.rand(b, k, H, W, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def identity(item):  # module level, since worker processes may pickle it
    return item


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_the_winner_is_the_largest_enlarged_map_whatever_the_chunk(chunk):
    maps = random_maps()
    enlarged = F.interpolate(maps, (22, 31), mode="bilinear", align_corners=False)
    assert segments.winner(maps, (22, 31), chunk).equal(enlarged.argmax(1))


def test_maps_are_enlarged_before_the_decision_and_not_after():
    maps = torch.tensor([[[[0.0, 1.0]], [[0.9, 0.0]]]])  # 1 at the left, 0 at the right; they cross right of the middle
    found = segments.winner(maps, (1, 200))[0, 0]
    assert found[:97].eq(1).all() and found[99:].eq(0).all()
    nearest = F.interpolate(maps.argmax(1, keepdim=True).float(), (1, 200))[0, 0, 0]
    assert not found.equal(nearest.long())


def test_at_a_tie_the_lower_prototype_wins_across_chunks():
    maps = torch.zeros(1, 5, 2, 2)
    assert segments.winner(maps, (3, 3), chunk=2).eq(0).all()


def test_segments_and_occupied_slots_come_from_the_same_similarities():
    torch.manual_seed(0)
    network = GroupingNetwork("tiny", K, 12, 6).eval()
    images = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8)
    found, owned = segments.segment(network, images)
    assert found.shape == (2, 32, 40) and owned.shape == (2, K) and not found.is_inference()
    _, similarity = network(segments.normalize(images))
    for b in range(2):
        assert owned[b].nonzero().flatten().tolist() == similarity[b].argmax(0).unique().tolist()
    assert found.equal(segments.winner(similarity, (32, 40)))


# ------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (4, 2)])
def test_pictures_come_in_order_whatever_the_batch_and_the_workers(batch_size, workers):
    pictures = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(9)]
    batches = list(segments.stream(pictures, identity, batch_size, workers))
    assert torch.cat([indices for indices, _ in batches]).tolist() == list(range(9))
    assert torch.cat([images for _, images in batches])[:, 0, 0, 0].tolist() == list(range(9))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_and_left_out_and_the_others_keep_their_numbers(tmp_path, capsys, workers):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"torn")
    pictures = segments.open_pictures("folder", tmp_path)
    found = list(segments.stream(pictures, segments.center_view(8), 2, workers))
    assert [indices.tolist() for indices, _ in found] == [[0], [2, 3]]
    assert "left out 1.png" in capsys.readouterr().err


class Broken:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise ValueError("the label of b.png has id 9")
        return torch.zeros(3, 2, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_problem_in_a_worker_process_is_still_one_line(workers):
    with pytest.raises(ValueError, match=r"^the label of b\.png has id 9$"):
        list(segments.stream(Broken(), identity, 3, workers))


def test_pictures_come_from_a_folder_from_its_val2017_or_are_drawn(tmp_path):
    (tmp_path / "val2017").mkdir()
    for folder in (tmp_path, tmp_path / "val2017"):
        Image.new("RGB", (9, 7)).save(folder / "a.png")
    assert len(segments.open_pictures("folder", tmp_path)) == 1
    assert len(segments.open_pictures("toy", None, 5)) == 5
    assert isinstance(segments.open_pictures("toy", None), ToyScenes)


def test_a_square_of_the_right_size_is_left_alone_and_others_are_cut_from_the_center():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert segments.center_view(64)(image).equal(image)
    wide = torch.zeros(3, 70, 210, dtype=torch.uint8)
    wide[:, :, 70:140] = 200
    view = segments.center_view(56)(wide)
    assert view.shape == (3, 56, 56) and view.float().mean() == 200


# ---------------------------------------------------------------------------------------- retrieval


def naive_retrieval(similarity, top):
    """(scores, pictures) per prototype from the definition: all scores at once, sorted by score, then by picture."""
    ranked = []
    for k in range(similarity.shape[1]):
        scores = []
        for b, maps in enumerate(similarity):
            owned = [(y, x) for y in range(H) for x in range(W) if maps[:, y, x].argmax() == k]
            if owned:
                scores.append((-sum(float(maps[k, y, x]) for y, x in owned) / len(owned), b))
        ranked.append([(-score, b) for score, b in sorted(scores)[:top]])
    return ranked


@pytest.mark.parametrize("batch", [1, 2, 5, 13])
def test_streamed_retrieval_equals_the_naive_one_with_ties_and_unoccupied_prototypes(batch):
    similarity = random_maps(13, seed=3).mul(4).round() / 4  # coarse values: many pixels and many scores are equal
    similarity[:, 4] = -1  # never the nearest
    similarity[9] = similarity[2]  # two pictures with the same scores
    similarity[:, 6] = -1
    similarity[5, 6, 1, 1] = 1.5  # occupied in one picture only
    found = segments.Retrieval(K, top=4)
    for indices in torch.arange(13).split(batch):
        found.add(indices, similarity[indices])
    for k, expected in enumerate(naive_retrieval(similarity, 4)):
        pictures, scores = found.pictures[k].tolist(), found.scores[k].tolist()
        assert pictures == [b for _, b in expected] + [-1] * (4 - len(expected))
        assert scores == pytest.approx([score for score, _ in expected] + [-math.inf] * (4 - len(expected)))
        assert found.active[k] == len(naive_retrieval(similarity, 13)[k])
    assert found.pictures[4].eq(-1).all() and found.pictures[6].tolist() == [5, -1, -1, -1]


def test_a_picture_in_which_a_prototype_owns_no_pixel_is_never_retrieved_for_it():
    similarity = torch.tensor([[[[0.9]], [[0.8]]], [[[0.1]], [[0.2]]]])  # prototype 1: second in picture 0, owner in 1
    found = segments.Retrieval(2, top=2)
    found.add(torch.arange(2), similarity)
    assert found.pictures.tolist() == [[0, -1], [1, -1]]  # by similarity alone, picture 0 would be the best for both


def test_the_score_of_a_segment_is_the_mean_over_its_own_pixels():
    similarity = torch.tensor([[[[0.5, 0.7, 0.1]], [[0.2, 0.1, 0.4]], [[0.0, 0.0, 0.0]]]])
    assert segments.segment_scores(similarity)[0].tolist() == pytest.approx([0.6, 0.4, -math.inf])


MEMORY = """
    import resource, torch
    from segments import Retrieval
    torch.set_num_threads(1)
    found, generator = Retrieval(2048, 5), torch.Generator().manual_seed(0)
    for indices in torch.arange(5000).split(16):
        found.add(indices, torch.rand(len(indices), 2048, 7, 7, generator=generator))
    assert (found.active > 0).all() and found.scores.isfinite().all()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_retrieval_over_5000_pictures_with_2048_prototypes_stays_under_2_gb():
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 2000  # MB, the whole process
