"""What is used of other libraries' private APIs is there, does what it did, and is used in few
files."""

import ast

import numpy as np
import pytest
import torch
from mmengine.config import DictAction
from mmengine.dataset import BaseDataset
from mmengine.model import ImgDataPreprocessor
from mmengine.runner import Runner

from conftest import ROOT
from dynamicdet import private_mmdet, private_mmengine, private_torch
from mmdet.apis import DetInferencer
from mmdet.models.data_preprocessors import BatchSyncRandomResize
from mmdet.models.dense_heads import GFLHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, Shared2FCBBoxHead
from mmdet.visualization import DetLocalVisualizer

#: Methods of libraries that classes of the package override, or call on themselves.
OVERRIDDEN = {
    '_apply': torch.nn.Module,
    '_load_from_state_dict': torch.nn.Module,
    '_load_weights_to_model': DetInferencer,
    '_init_model': DetInferencer,
    '_draw_instances': DetLocalVisualizer,
    '_bbox_post_process': BaseDenseHead,
    '_parse_iterable': DictAction,
}
#: Of named tuples, whose methods begin with an underscore by design.
OF_NAMED_TUPLES = {'_replace', '_asdict', '_fields'}


def test_private_names_are_in_files_of_their_own():
    """All else that begins with an underscore is the project's own, or overridden."""
    trees = {
        path: ast.parse(path.read_text())
        for folder in ('projects', 'tools')
        for path in (ROOT / folder).rglob('*.py')
    }
    defined = {*OVERRIDDEN, *OF_NAMED_TUPLES, '_input_size'}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                defined.add(getattr(node, 'attr', None) or node.id)
    defined -= {'_load_from', '_resume', '_version'}
    found = [
        f'{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}'
        for path, tree in trees.items()
        if not path.name.startswith('private_')
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith('_')
        and not node.attr.startswith('__')
        and node.attr not in defined
    ]
    found += [
        f'{path.relative_to(ROOT)}:{node.lineno}: {node.module}'
        for path, tree in trees.items()
        if not path.name.startswith('private_')
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and any(part[0] == '_' and part[:2] != '__' for part in node.module.split('.'))
    ]
    assert found == []


@pytest.mark.parametrize('name', OVERRIDDEN)
def test_overridden_methods_are_there(name):
    assert callable(getattr(OVERRIDDEN[name], name))


def test_a_runner_says_what_it_loads(tmp_path):
    runner = Runner(
        torch.nn.Linear(1, 1),
        str(tmp_path),
        load_from='first.pth',
        resume=True,
        randomness=dict(seed=0, diff_rank_seed=True),
        default_scope='mmengine',
        experiment_name='private_apis',
    )
    assert private_mmengine.path_to_load(runner) == 'first.pth'
    assert private_mmengine.resumes(runner) and not private_mmengine.trains(runner)
    assert private_mmengine.ranks_differ_in_seed(runner)
    assert private_mmengine.train_loader_settings(runner) is None
    private_mmengine.start_from(runner, 'second.pth')
    private_mmengine.start_anew(runner)
    assert private_mmengine.path_to_load(runner) == 'second.pth'
    assert not private_mmengine.resumes(runner)
    # Whom it tells are the Runner's own loads.
    assert {'_load_from', '_resume'} <= set(Runner.load_or_resume.__code__.co_names)


def test_what_mmengine_reads_and_prepares():
    assert [private_mmengine.parse_scalar(text) for text in ('3', '0.5', 'true', 'None', 'a')] == [
        3,
        0.5,
        True,
        None,
        'a',
    ]
    plain, other = ImgDataPreprocessor(), ImgDataPreprocessor([1] * 3, [1] * 3, bgr_to_rgb=True)
    assert not private_mmengine.normalizes(plain) and private_mmengine.normalizes(other)
    assert not private_mmengine.swaps_channels(plain) and private_mmengine.swaps_channels(other)


def test_what_decodes_the_outputs_of_heads():
    head = YOLOXHead(num_classes=1, in_channels=8, feat_channels=8)
    assert not private_mmdet.decodes_as(head, GFLHead)
    assert private_mmdet.decodes_as(head, BaseDenseHead)
    assert private_mmdet.decodes_as(Shared2FCBBoxHead(num_classes=1), BBoxHead)
    priors, raw = torch.tensor([[8.0, 16.0, 8.0, 8.0]]), torch.zeros(1, 4)
    assert private_mmdet.decode_yolox(head, priors, raw).tolist() == [[4, 12, 12, 20]]


def test_an_empty_data_set_is_told_from_other_errors():
    class Empty(BaseDataset):
        def load_data_list(self):
            return []

    with pytest.raises(ValueError) as error:
        Empty()
    assert private_mmengine.failed_to_serialize(error.value)
    assert not private_mmengine.failed_to_serialize(ValueError('another'))


def test_the_size_of_a_batch_is_kept_where_it_was():
    assert BatchSyncRandomResize((32, 32), 1)._input_size is None


def test_tensors_without_values_and_leaves():
    with private_torch.ShapesOnly(allow_non_fake_inputs=True):
        assert torch.ones(2, 3).matmul(torch.ones(3, 4)).shape == (2, 4)
    assert private_torch.tree_leaves(dict(a=[1, (2,)], b=3)) == [1, 2, 3]


def test_changes_of_a_tensor_are_counted():
    tensor = torch.zeros(2)
    before = private_torch.changes_of(tensor)
    tensor.add_(1)
    assert private_torch.changes_of(tensor) == before + 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='torch without oneDNN')
def test_convolutions_of_one_dnn():
    assert isinstance(private_torch.has_bfloat16_convolutions(), bool)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    x = torch.rand(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    settings = conv.padding, conv.stride, conv.dilation, conv.groups
    with torch.no_grad():
        wanted = conv(x)
        packed = private_torch.pack_convolution_weight(conv.weight, *settings, list(x.shape))
        operands = x, packed, conv.bias, *settings
        plain = private_torch.FUSED_CONVOLUTION(*operands, 'none', [], '')
        total = torch.ones_like(wanted).contiguous(memory_format=torch.channels_last)
        summed = private_torch.FUSED_SUM_CONVOLUTION.binary(
            total, *operands, 'add', None, None, [], ''
        )
    np.testing.assert_allclose(plain, wanted, atol=1e-5)
    np.testing.assert_allclose(summed, wanted + 1, atol=1e-5)
