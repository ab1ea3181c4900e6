"""Official files of YOLOv5: every key is taken, and what fits nowhere is one line."""

import sys
import types

import pytest
import torch
from foreign import ROOT, build, convert
from torch import nn

from dynamicdet.cascade.weights import require_complete
from dynamicdet.checkpoints import read_checkpoint
from dynamicdet.errors import UsageError
from dynamicdet.exchange.rules import apply_rules
from dynamicdet.interop.convert import convert_checkpoint
from dynamicdet.interop.yolov5 import yolov5_rules
from dynamicdet.models.yolo import concatenate_maps

#: Their layers with weights: number, kind, sources, channels, and kernel or count.
THEIRS = (
    (0, 'Conv', (-1,), 64, 6),
    (1, 'Conv', (0,), 128, 3),
    (2, 'C3', (1,), 128, 3),
    (3, 'Conv', (2,), 256, 3),
    (4, 'C3', (3,), 256, 6),
    (5, 'Conv', (4,), 512, 3),
    (6, 'C3', (5,), 512, 9),
    (7, 'Conv', (6,), 1024, 3),
    (8, 'C3', (7,), 1024, 3),
    (9, 'SPPF', (8,), 1024, 5),
    (10, 'Conv', (9,), 512, 1),
    (13, 'C3', (10, 6), 512, 3),
    (14, 'Conv', (13,), 256, 1),
    (17, 'C3', (14, 4), 256, 3),
    (18, 'Conv', (17,), 256, 3),
    (20, 'C3', (18, 14), 512, 3),
    (21, 'Conv', (20,), 512, 3),
    (23, 'C3', (21, 10), 1024, 3),
)
#: In units of each level's stride.
ANCHORS = torch.tensor(
    [[10.0, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
)
ANCHORS = ANCHORS.view(3, 3, 2) / torch.tensor([8.0, 16, 32])[:, None, None]


def shapes(width, depth, classes=80):
    """Keys and shapes of their state dict."""
    found, out = {}, {-1: 3}

    def normed(name, channels, into, kernel=1):
        found[f'{name}.conv.weight'] = (channels, into, kernel, kernel)
        found.update(
            {
                f'{name}.bn.{leaf}': (channels,)
                for leaf in ('weight', 'bias', 'running_mean', 'running_var')
            }
        )
        found[f'{name}.bn.num_batches_tracked'] = ()

    for number, kind, sources, channels, extra in THEIRS:
        name, into = f'model.{number}', sum(out[source] for source in sources)
        out[number] = channels = -(-int(channels * width) // 8) * 8
        half = channels // 2
        if kind == 'Conv':
            normed(name, channels, into, extra)
        elif kind == 'SPPF':
            normed(f'{name}.cv1', into // 2, into)
            normed(f'{name}.cv2', channels, 2 * into)
        else:
            normed(f'{name}.cv1', half, into)
            normed(f'{name}.cv2', half, into)
            normed(f'{name}.cv3', channels, channels)
            for index in range(max(round(extra * depth), 1)):
                normed(f'{name}.m.{index}.cv1', half, half)
                normed(f'{name}.m.{index}.cv2', half, half, 3)
    found['model.24.anchors'] = (3, 3, 2)
    for level, number in enumerate((17, 20, 23)):
        found[f'model.24.m.{level}.weight'] = (3 * (5 + classes), out[number], 1, 1)
        found[f'model.24.m.{level}.bias'] = (3 * (5 + classes),)
    return found


def values(**size):
    """A state dict of theirs with random values."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes(**size).items():
        if key.endswith('num_batches_tracked'):
            state[key] = torch.tensor(7)
        elif key.endswith(('running_var', 'bn.weight')):
            state[key] = 0.5 + torch.rand(shape, generator=generator)
        else:
            fan = max(1, shape[1] * shape[2] * shape[3] if len(shape) == 4 else 1)
            state[key] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
    state['model.24.anchors'] = ANCHORS.clone()
    return state


@pytest.mark.parametrize(
    'arch, width, depth',
    [('n', 0.25, 0.33), ('s', 0.5, 0.33), ('m', 0.75, 0.67), ('l', 1.0, 1.0), ('x', 1.25, 1.33)],
)
def test_all_keys_of_the_family(arch, width, depth):
    theirs = shapes(width, depth)
    with torch.device('meta'):
        model = build(f'yolov5_{arch}')
        state = {key: torch.empty(shape) for key, shape in theirs.items()}
    del state['model.24.anchors']
    found, skipped = apply_rules(yolov5_rules(model), state)
    assert set(skipped) == {'counters of training'}
    require_complete(model, found)


def their_forward(state, images):
    """Theirs, layer by layer, from the state dict alone; decoded boxes, objectness and classes of
    each level, (N, 3, H, W, 5 + C)."""

    def conv(name, x):
        weight = state[f'{name}.conv.weight']
        kernel = weight.shape[-1]
        stride = (
            2
            if name
            in ('model.0', 'model.1', 'model.3', 'model.5', 'model.7', 'model.18', 'model.21')
            else 1
        )
        x = nn.functional.conv2d(x, weight, None, stride, 2 if kernel == 6 else kernel // 2)
        x = nn.functional.batch_norm(
            x,
            *(
                state[f'{name}.bn.{leaf}']
                for leaf in ('running_mean', 'running_var', 'weight', 'bias')
            ),
            eps=1e-3,
        )
        return x * x.sigmoid()

    maps = {-1: images}
    for number, kind, sources, _, _ in THEIRS:
        name, x = f'model.{number}', concatenate_maps([maps[source] for source in sources])
        if kind == 'Conv':
            maps[number] = conv(name, x)
        elif kind == 'SPPF':
            x = conv(f'{name}.cv1', x)
            pools = [nn.functional.max_pool2d(x, size, 1, size // 2) for size in (5, 9, 13)]
            maps[number] = conv(f'{name}.cv2', torch.cat([x, *pools], dim=1))
        else:
            main, index = conv(f'{name}.cv1', x), 0
            while f'{name}.m.{index}.cv1.conv.weight' in state:
                inner = conv(f'{name}.m.{index}.cv2', conv(f'{name}.m.{index}.cv1', main))
                main = main + inner if number < 10 else inner
                index += 1
            maps[number] = conv(f'{name}.cv3', torch.cat([main, conv(f'{name}.cv2', x)], dim=1))
    levels = []
    for level, number in enumerate((17, 20, 23)):
        out = nn.functional.conv2d(
            maps[number], state[f'model.24.m.{level}.weight'], state[f'model.24.m.{level}.bias']
        )
        out = out.unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2).sigmoid()
        rows, columns = (torch.arange(side, dtype=torch.float32) for side in out.shape[2:4])
        cells = torch.stack(torch.meshgrid(columns, rows, indexing='xy'), dim=2)
        stride = 8 * 2**level
        anchors = (state['model.24.anchors'][level] * stride)[:, None, None]
        levels.append(
            torch.cat(
                [
                    (2 * out[..., :2] - 0.5 + cells) * stride,
                    (2 * out[..., 2:4]) ** 2 * anchors,
                    out[..., 4:],
                ],
                dim=-1,
            )
        )
    return levels


@pytest.fixture
def whole_module(monkeypatch):
    """``whole_module(state)``: nested modules that hold the state, of a class of theirs. They can
    be written until ``monkeypatch`` is undone."""
    namespace = types.ModuleType('models.yolo')
    exec('from torch.nn import Module\nclass Model(Module): pass', vars(namespace))
    monkeypatch.setitem(sys.modules, 'models', types.ModuleType('models'))
    monkeypatch.setitem(sys.modules, 'models.yolo', namespace)

    def make(state):
        root = namespace.Model()
        for key, value in state.items():
            *path, leaf = key.split('.')
            module = root
            for part in path:
                if part not in module._modules:
                    module.add_module(part, namespace.Model())
                module = module._modules[part]
            module.register_buffer(leaf, value)
        root.names, root.yaml = ['a', 'b', 'c'], dict(nc=3)
        return root

    return make


@pytest.mark.parametrize('form', ['state dict', 'module', 'training'])
def test_the_network_is_theirs(tmp_path, monkeypatch, whole_module, form):
    """YOLOv5n with three classes gives what the published formulas give with the file's values."""
    state = values(width=0.25, depth=0.33, classes=3)
    content = dict(
        epoch=-1, best_fitness=None, model=state, ema=None, optimizer=None, date='2022-02-22'
    )
    if form != 'state dict':
        content.update(model=whole_module(state))
    if form == 'training':
        # The moving averages count.
        content.update(
            model=whole_module({key: value + 1 for key, value in state.items()}),
            ema=content['model'],
        )
    torch.save(content, tmp_path / 'x.pt')
    monkeypatch.undo()
    assert 'models.yolo' not in sys.modules
    model = build('yolov5_n', **{'model.bbox_head.num_classes': 3})
    checkpoint, lines = convert_checkpoint(str(tmp_path / 'x.pt'), 'yolov5', model)
    assert '1 known and unneeded: anchors, which the config has' in lines
    model.load_state_dict(checkpoint['state_dict'])
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = their_forward(state, images)
        classes, boxes, objects = model.eval()._forward(images)
    for level, want in enumerate(wanted):
        assert want[..., 4].std() > 1e-3
        scores = [
            part[level].unflatten(1, (3, -1)).permute(0, 1, 3, 4, 2) for part in (objects, classes)
        ]
        torch.testing.assert_close(
            torch.cat(scores, dim=-1).sigmoid(), want[..., 4:], atol=1e-4, rtol=1e-3
        )
        at = (torch.ones(want.shape[1:4]) > 0).nonzero(as_tuple=True)
        raw = boxes[level].unflatten(1, (3, 4))[1][at[0], :, at[1], at[2]]
        torch.testing.assert_close(
            model.bbox_head.decode(raw, level, *at),
            want[1, ..., :4].flatten(0, 2),
            atol=1e-2,
            rtol=1e-3,
        )


def test_the_tool(tmp_path, monkeypatch):
    torch.save(
        dict(model=values(width=0.25, depth=0.33, classes=3), ema=None), tmp_path / 'yolov5n.pt'
    )
    status, said, complained = convert(
        monkeypatch,
        tmp_path / 'yolov5n.pt',
        'yolov5',
        ROOT / 'configs/yolov5_n.py',
        tmp_path / 'ours.pth',
        '--cfg-options',
        'model.bbox_head.num_classes=3',
    )
    assert status == 0, complained
    checkpoint = read_checkpoint(str(tmp_path / 'ours.pth'))
    assert checkpoint['meta']['source']['family'] == 'yolov5' and 'written to' in said
    assert set(checkpoint['state_dict']) == set(
        build('yolov5_n', **{'model.bbox_head.num_classes': 3}).state_dict()
    )


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


FAULTS = {
    'another size': (lambda state: state, 'yolov5_m', 'of another shape'),
    'another number of classes': (lambda state: state, 'yolov5_n', 'of another shape'),
    'an entry too few': (
        lambda state: without(state, 'model.13.m.0.cv2.bn.bias'),
        None,
        '1 missing (such as neck.layers.13.blocks.0.conv2.bn.bias)',
    ),
    'a layer before release 6': (
        lambda state: {
            'model.0.conv.conv.weight': torch.ones(16, 12, 3, 3),
            **without(state, 'model.0.conv.weight'),
        },
        None,
        'of a release before 6.0',
    ),
    'an entry too many': (
        lambda state: {**state, 'model.33.m.0.weight': torch.ones(1)},
        None,
        "1 of its 350 entries are unknown to this source (such as 'model.33.m.0.weight')",
    ),
    'a head of other anchors': (
        lambda state: {**state, 'model.24.m.0.bias': torch.ones(25)},
        None,
        "the entry 'model.24.m.0.bias' has the shape (25,)",
    ),
    'another detector': (
        lambda state: state,
        'yolov7',
        'name a --config such as configs/yolov5_s.py',
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_what_does_not_fit_is_one_line(tmp_path, fault):
    change, config, said = FAULTS[fault]
    torch.save(dict(model=change(values(width=0.25, depth=0.33, classes=3))), tmp_path / 'x.pt')
    options = {} if config else {'model.bbox_head.num_classes': 3}
    model = build(config or 'yolov5_n', **options)
    with pytest.raises(UsageError) as caught:
        convert_checkpoint(str(tmp_path / 'x.pt'), 'yolov5', model)
    assert said in str(caught.value)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    'anchors, said',
    [
        (ANCHORS, 'which the config has'),
        (ANCHORS.half(), 'which the config has'),
        (2 * ANCHORS, 'THAT DIFFER'),
        (ANCHORS[:, :2], 'THAT DIFFER'),
        (torch.ones(4, 3, 2), 'THAT DIFFER'),
    ],
)
def test_anchors_are_compared(anchors, said):
    """In units of each level's stride, and in older files once more in pixels."""
    with torch.device('meta'):
        model = build('yolov5_n')
    model.bbox_head.anchors = build('yolov5_n').bbox_head.anchors
    ((reason, count),) = apply_rules(yolov5_rules(model), {'model.24.anchors': anchors})[1].items()
    assert said in reason and count == 1
