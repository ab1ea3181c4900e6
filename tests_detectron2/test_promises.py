"""What holds of every stock detector that is made dynamic."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from conftest import ZOO, assert_equal, build, images, wake

KINDS = list(ZOO)


def of_plain(kind, **settings):
    """A stock detector, and a dynamic one with its weights."""
    plain = build(kind, dynamic=False).eval()
    dynamic = build(kind, **settings).eval()
    dynamic.load_state_dict(plain.state_dict(), strict=False)
    return plain, dynamic


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_exits_with_plain_weights_are_the_stock_detector(kind):
    plain, dynamic = of_plain(kind)
    batch = images()
    wanted = plain(batch)
    assert sum(len(result['instances']) for result in wanted) > 0
    dynamic.set_budget(threshold=1)
    for result, stock in zip(dynamic(batch), wanted):
        assert result['exit'] == 0 and 0 <= result['difficulty'] <= 1
        assert_equal({**result, 'difficulty': 0, 'exit': 0}, stock)
    # The connections start at zero.
    dynamic.set_budget(threshold=-1)
    for result, stock in zip(dynamic(batch), wanted):
        assert result['exit'] == 1
        assert_equal(result, stock, 1e-4)


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_mixed_batches_keep_their_order(kind):
    model = build(kind, shared=False).eval()
    wake(model)
    batch = images()
    by_exit = []
    for threshold in (1, -1):
        model.set_budget(threshold=threshold)
        by_exit.append(model(batch))
    difficulties = [result['difficulty'] for result in by_exit[0]]
    assert len(set(difficulties)) == 3
    model.set_budget(threshold=sorted(difficulties)[1])
    results = model(batch)
    assert sorted(result['exit'] for result in results) == [0, 0, 1]
    for row, result in enumerate(results):
        assert result['exit'] == (difficulties[row] > sorted(difficulties)[1])
        assert result['difficulty'] == pytest.approx(difficulties[row])
        assert_equal(result, by_exit[result['exit']][row], 1e-3)


@pytest.mark.parametrize('kind', ['faster', 'retinanet'])
@torch.no_grad()
def test_what_is_not_needed_does_not_run(kind):
    model = build(kind, shared=False).eval()
    calls = []
    for name, part in (
        ('second', model.backbone.second.res3),
        ('branch0', model.branches[0].backbone),
        ('branch1', model.branches[1].backbone),
    ):
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.set_budget(threshold=1)
    model(images())
    assert calls == ['branch0']
    calls.clear()
    model.set_budget(threshold=-1)
    model(images())
    assert calls == ['second', 'branch1']


@pytest.mark.parametrize('kind', KINDS)
def test_step_1_trains_both_exits(kind):
    model = build(kind).train()
    with EventStorage(0) as storage:
        losses = model(images(annotated=True))
        # Cascade R-CNN names its stages itself.
        assert all(name.startswith(('exit0/', 'exit1/', 'stage')) for name in storage.latest())
    names = {name.partition('.')[2] for name in losses}
    assert set(losses) == {f'exit{exit}.{name}' for exit in (0, 1) for name in names}
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    reached = {
        name.partition('.')[2].partition('.')[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    assert {'first', 'second', 'connections', '0'} <= reached
    # FREEZE_AT leaves stems alone, and the router is for step 2.
    assert all(
        parameter.grad is None
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad or name.startswith('router.')
    )
    zero = [p for name, p in model.named_parameters() if name.endswith('projections.0.1.weight')]
    assert zero and all(p.grad is not None and p.requires_grad for p in zero)


@pytest.mark.parametrize('kind', KINDS)
def test_step_2_changes_the_router_alone(kind):
    model = build(kind, train_router=True).train()
    wake(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert model.training and not model.branches.training
    with EventStorage(0) as storage:
        losses = model(images(annotated=True))
        losses['loss_router'].backward()
        optimizer.step()
        assert {'router/difficulty', 'router/delta'} <= storage.latest().keys()
        assert not any('roi_head' in name or 'anchors' in name for name in storage.latest())
    assert set(losses) == {'loss_router'}
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.allclose(value.float(), before[name].float(), 0, 0, equal_nan=True)
    }
    assert changed and all(name.startswith('router.') for name in changed)


@pytest.mark.parametrize('kind', KINDS)
def test_losses_of_an_image_do_not_depend_on_others(kind):
    model = build(kind, train_router=True).train()
    wake(model)
    batch = images((64, 64), (64, 64), annotated=True)
    losses, features = model.exit_losses(batch)
    assert losses.shape == (2, 2) and features.shape[0] == 2
    alone = torch.cat([model.exit_losses([image])[0] for image in batch], dim=1)
    torch.testing.assert_close(losses, alone, rtol=1e-3, atol=1e-4)
    assert (losses[0] - losses[1]).abs().max() > 1e-5
    # Images of other sizes, so with padding.
    assert model.exit_losses(images(annotated=True))[0].isfinite().all()


def test_exits_with_the_same_weights_have_the_same_losses():
    _, model = of_plain('mask', train_router=True)
    losses, _ = model.exit_losses(images(annotated=True))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('objective', ['ap', 'loss_sum', 'rank'])
def test_other_objectives(objective):
    model = build('faster', options=('MODEL.DYNAMIC.OBJECTIVE.TYPE', objective), train_router=True)
    gains, features = model.train().exit_gains(images(annotated=True))
    assert gains.shape == (3,) and gains.isfinite().all()


def test_gains_by_class():
    model = build(
        'faster',
        options=(
            'MODEL.DYNAMIC.OBJECTIVE.TYPE',
            'loss_sum',
            'MODEL.DYNAMIC.OBJECTIVE.BY_CLASS',
            True,
        ),
        train_router=True,
    )
    parts, counts, _ = model.train().class_gains(images(annotated=True))
    assert parts.shape == (3, 5) and counts.tolist() == [[1, 0, 0, 1]] * 3
