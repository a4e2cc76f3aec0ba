"""The comparisons over two processes: Sinkhorn balances all pixels, contrasts know all keys."""

import pytest
import torch
import torch.distributed as dist

from comparisons import dense, slot_matching
from comparisons.sinkhorn import sinkhorn
from staged import fork_server, join

B, K, D, H, W = 2, 6, 7, 4, 5  # images per process
VALID = torch.tensor([True, True, False, True])  # images that overlap: unequal numbers per process
MATCHING = torch.stack([torch.arange(K).roll(shift) for shift in range(2 * B)])


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maps():
    similarity = random(2 * B, K, H, W).tanh()
    similarity[:B, 1] += 0.4  # nearest to most pixels of the first process
    return similarity


def contrasts(part):
    """Both losses on a part of the joined batch, and the gradients of their queries."""
    query = random(2 * B, D, 8, 8)[part].requires_grad_()
    slots = random(2 * B, K, D, seed=1)[part].requires_grad_()
    keys, targets = random(2 * B, D, 8, 8, seed=2)[part], random(2 * B, K, D, seed=3)[part]
    place = dense.place_contrast(query, keys, VALID[part], 0.2)
    slot = slot_matching.matched_contrast(slots, targets, MATCHING[part], 0.2)
    (place + slot).backward()
    return place.detach(), slot.detach(), query.grad, slots.grad


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    part = slice(rank * B, (rank + 1) * B)
    many = sinkhorn(maps()[part], 0.1, iterations=50)
    torch.save(dict(many=many, contrasts=contrasts(part)), f"{folder}/{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        both = [fork_server().Process(target=one_of_two, args=(rank, folder)) for rank in (0, 1)]
        for process in both:
            process.start()
    assert join(both) == [0, 0]
    return [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]


def test_over_two_processes_every_prototype_owns_the_same_share_to_a_thousandth(found):
    q = torch.cat([rank["many"] for rank in found])
    share = q.sum((0, 2, 3)) / (2 * B * H * W)
    assert (share * K - 1).abs().max() < 1e-3
    assert torch.allclose(q.sum(1), torch.ones(2 * B, H, W, dtype=torch.float64))
    of_one = found[0]["many"].sum((0, 2, 3)) / (B * H * W)
    assert (of_one * K - 1).abs().max() > 0.05  # it is not balanced in each process alone
    assert torch.allclose(q, sinkhorn(maps(), 0.1, iterations=50), rtol=1e-9)


def test_the_contrasts_of_two_processes_are_those_of_the_joined_batch(found):
    place, slot, *gradients = contrasts(slice(None))
    for i, whole in enumerate((place, slot)):
        mean = sum(rank["contrasts"][i] for rank in found).item() / 2
        assert mean == pytest.approx(whole.item(), rel=1e-9)
    for i, whole in enumerate(gradients, start=2):
        halves = torch.cat([rank["contrasts"][i] for rank in found])
        assert torch.allclose(halves / 2, whole, rtol=1e-9)
