import pytest
import torch

from dynamicdet.routing import router_loss, weigh


def test_by_hand():
    """phi = 0.25, L1 = 3, L2 = 1, delta = 1: 0.75 * (3 - 0.5) + 0.25 * (1 + 0.5) = 2.25."""
    loss = router_loss(torch.tensor([0.25]), torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor(1.0))
    assert loss.item() == pytest.approx(2.25)


def test_gradient_is_minus_the_difference_plus_delta():
    phi = torch.tensor([0.2, 0.9], requires_grad=True)
    first = torch.tensor([3.0, 1.0], requires_grad=True)
    second = torch.tensor([1.0, 2.0], requires_grad=True)
    router_loss(phi, first, second, torch.tensor(0.5)).backward()
    torch.testing.assert_close(phi.grad, torch.tensor([-2 + 0.5, 1 + 0.5]) / 2)
    assert first.grad is None and second.grad is None


def test_the_median_pushes_half_of_the_images_each_way():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 101, generator=generator)
    phi = torch.full((101, ), 0.5, requires_grad=True)
    router_loss(phi, first, second, (first - second).median()).backward()
    assert (phi.grad > 0).sum() == (phi.grad < 0).sum() == 50


def test_weightings():
    losses = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert torch.equal(weigh(losses, [0, 1, 5], 'mean'), losses)
    assert torch.equal(weigh(losses, [0, 1, 5], 'objects'), losses * torch.tensor([0.0, 1.0, 5.0]))
