import pytest
import torch

from dynamicdet.errors import UsageError
from dynamicdet.routing.router import Router


def test_by_hand():
    """Maps of value 1 and 2; fc1 gives 1 + 2 = 3, fc2 gives -3 + 1 = -2: sigmoid(-2)."""
    router = Router([2, 2], reduction=4)
    torch.nn.init.constant_(router.fc1.weight, 0.5)
    torch.nn.init.zeros_(router.fc1.bias)
    torch.nn.init.constant_(router.fc2.weight, -1.0)
    torch.nn.init.ones_(router.fc2.bias)
    got = router([torch.ones(3, 2, 8, 8), torch.full((3, 2, 4, 4), 2.0)])
    torch.testing.assert_close(got, torch.full((3,), -2.0).sigmoid())


def test_size_is_the_papers():
    """Five maps of Dy-YOLOv7, 2.08 M parameters."""
    router = Router([64, 256, 512, 1024, 1024])
    assert router.fc1.out_features == 720
    assert sum(p.numel() for p in router.parameters()) / 1e6 == pytest.approx(2.08, abs=0.01)


def test_float32_under_autocast():
    router = Router([8])
    maps = [torch.rand(2, 8, 4, 4)]
    expected = router(maps)
    with torch.autocast('cpu', torch.bfloat16):
        got = router([maps[0].bfloat16()])
        assert got.dtype == torch.float32
        assert torch.equal(router(maps), expected)
    assert ((got >= 0) & (got <= 1)).all()


def test_shares_of_padded_images_are_whole_cells():
    """Of 25 cells, 7 / 25 * 25 is more than 7 in floating point."""
    router = Router([1], pools=('mean',))
    for cells in range(1, 60):
        counts = torch.arange(1.0, cells + 1)
        for seen in range(1, cells + 1):
            share = 32 * seen / (32 * cells), 1.0
            pooled = router.pool([counts[None, None, :, None]], [share])
            assert pooled.item() == pytest.approx((1 + seen) / 2)


def test_padding_does_not_count():
    router = Router([4])
    image = torch.rand(4, 8, 6)
    padded = torch.full((2, 4, 8, 8), 100.0)
    padded[0, :, :, :6] = image
    padded[1] = torch.rand(4, 8, 8)
    got = router([padded], [(1.0, 0.75), (1.0, 1.0)])
    torch.testing.assert_close(got[0], router([image[None]])[0])
    torch.testing.assert_close(got[1], router([padded[1:]])[0])
    # At least one cell is looked at, however narrow the image.
    assert torch.isfinite(router([padded], [(0.01, 0.01), (1.0, 1.0)])).all()


def test_standardized_by_hand():
    """(3 - 1) / 2 = 1 in both channels; weights 1: sigmoid(relu(2) * 1)."""
    router = Router([2], reduction=2)
    for layer in (router.fc1, router.fc2):
        torch.nn.init.ones_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    router.mean.fill_(1.0)
    router.std.fill_(2.0)
    got = router([torch.full((1, 2, 4, 4), 3.0)])
    torch.testing.assert_close(got, torch.tensor([2.0]).sigmoid())


def test_pools_by_hand():
    """Channels hold 0, 0, 0, 4 and 1, 1, 3, 3: means 1, 2; maxima 4, 3; spreads sqrt(3), 1."""
    maps = [torch.tensor([[[[0.0, 0.0], [0.0, 4.0]]]]), torch.tensor([[[[1.0, 1.0], [3.0, 3.0]]]])]
    router = Router([1, 1], reduction=2, pools=('mean', 'max', 'std'))
    torch.testing.assert_close(router.pool(maps), torch.tensor([[1, 2, 4, 3, 3**0.5, 1]]))
    assert router.fc1.in_features == 6 and router.fc1.out_features == 3
    # Another order is another vector; the mean alone is the paper's.
    torch.testing.assert_close(
        Router([1, 1], pools=('max', 'mean'), reduction=1).pool(maps),
        torch.tensor([[4.0, 3, 1, 2]]),
    )
    torch.testing.assert_close(Router([1, 1], reduction=1).pool(maps), torch.tensor([[1.0, 2]]))


def test_padding_is_in_no_pool():
    router = Router([4], pools=('mean', 'max', 'std'))
    image = torch.rand(4, 8, 6)
    padded = torch.full((2, 4, 8, 8), 100.0)
    padded[0, :, :, :6] = image
    padded[1] = torch.rand(4, 8, 8)
    got = router.pool([padded], [(1.0, 0.75), (1.0, 1.0)])
    torch.testing.assert_close(
        got, torch.cat([router.pool([image[None]]), router.pool([padded[1:]])])
    )
    # Of one cell there is no spread, and no NaN.
    narrow = router.pool([padded], [(0.01, 0.01), (1.0, 1.0)])
    assert (narrow[0, 8:] == 0).all() and torch.isfinite(narrow).all()


def test_pools_in_half_precision():
    """Spread around a large mean, which a mean of squares would lose."""
    values = (100 + torch.arange(64.0).reshape(1, 1, 8, 8) / 2).bfloat16()
    router = Router([1], reduction=1, pools=('mean', 'max', 'std'))
    got = router.pool([values])
    assert got.dtype == torch.float32
    own = values.double()
    expected = torch.stack([own.mean(), own.max(), own.std(correction=0)]).float()[None]
    torch.testing.assert_close(got, expected)


def test_the_papers_router_has_the_same_entries_as_ever():
    assert {name: tuple(value.shape) for name, value in Router([8, 8]).state_dict().items()} == {
        'mean': (16,),
        'std': (16,),
        'fc1.weight': (4, 16),
        'fc1.bias': (4,),
        'fc2.weight': (1, 4),
        'fc2.bias': (1,),
    }


@pytest.mark.parametrize('pools', [(), ('mean', 'median')])
def test_unknown_pools_are_refused(pools):
    with pytest.raises(UsageError, match='pools are some of mean, max, std'):
        Router([8], pools=pools)
