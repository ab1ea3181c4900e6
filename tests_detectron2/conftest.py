"""What the tests of the Detectron2 side share: real detectors, shrunk until a CPU runs them in
less than a second. `make test-detectron2` runs them; a missing Detectron2 is a failure."""

import os
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

import dynamicdet_detectron2 as project

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]

#: Name -> config in Detectron2's zoo.
ZOO = dict(
    faster='COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml',
    mask='COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml',
    cascade='Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml',
    keypoint='COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml',
    retinanet='COCO-Detection/retinanet_R_50_FPN_1x.yaml',
    panoptic='COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml',
    fcos='COCO-Detection/fcos_R_50_FPN_1x.py',
)
#: What makes any of them small.
SMALL = """
    MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.RESNETS.RES2_OUT_CHANNELS 16
    MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.FPN.OUT_CHANNELS 16
    MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.ROI_MASK_HEAD.NUM_CONV 1
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,) MODEL.ROI_HEADS.NUM_CLASSES 4
    MODEL.RETINANET.NUM_CLASSES 4 MODEL.RETINANET.NUM_CONVS 1 MODEL.SEM_SEG_HEAD.CONVS_DIM 8
    MODEL.SEM_SEG_HEAD.NUM_CLASSES 5 MODEL.SEM_SEG_HEAD.NORM '' TEST.DETECTIONS_PER_IMAGE 10
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RETINANET.SCORE_THRESH_TEST 0.0
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50
    MODEL.RPN.POST_NMS_TOPK_TRAIN 30 MODEL.RPN.POST_NMS_TOPK_TEST 20
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 MODEL.RETINANET.TOPK_CANDIDATES_TEST 20
    MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 5
""".split()


def small_config(kind: str, dynamic: bool = True, *options):
    """A yaml config of the zoo's, shrunk, dynamic or plain."""
    cfg = get_cfg()
    project.add_dynamicdet_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(ZOO[kind]))
    cfg.merge_from_list([value.strip("'") or '' for value in SMALL])
    if dynamic:
        cfg.MODEL.DYNAMIC.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = 'DynamicDetector'
    cfg.merge_from_list(list(options))
    return cfg


def small_fcos():
    """The zoo's FCOS, shrunk: a LazyConfig."""
    model = model_zoo.get_config(ZOO['fcos']).model
    model.backbone.bottom_up.stem.out_channels = 8
    # Its stages are built by depth alone: the narrowest there is.
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.bottom_up.stem.out_channels = 64
    model.backbone.bottom_up.stages.pop('stride_in_1x1', None)
    model.backbone.top_block.in_channels = 16
    model.backbone.out_channels = 16
    model.num_classes = 4
    model.head.conv_dims = [16]
    # With 'GN' the head of Detectron2 0.6 fails in torch since 1.11, as it is.
    model.head.norm = ''
    model.head.input_shape = [ShapeSpec(channels=16)] * 5
    model.test_score_thresh = 0.0
    model.test_topk_candidates = 20
    model.max_detections_per_image = 10
    return model


def build(kind: str, dynamic: bool = True, options: tuple = (), **settings):
    """A detector with random weights, whose activations neither vanish nor explode."""
    from detectron2.config import instantiate
    from detectron2.modeling import build_model

    torch.manual_seed(0)
    if kind == 'fcos':
        model = small_fcos()
        model = instantiate(project.make_dynamic(model, **settings) if dynamic else model)
    else:
        names = [str(part) for item in settings.items() for part in item]
        names[::2] = [f'MODEL.DYNAMIC.{name.upper()}' for name in names[::2]]
        model = build_model(small_config(kind, dynamic, *names, *options))
    calm(model)
    return model


def calm(model: torch.nn.Module) -> None:
    """Halve what norms let pass; connections stay at zero."""
    for name, module in model.named_modules():
        if 'connections' not in name and 'Norm' in type(module).__name__:
            if getattr(module, 'weight', None) is not None:
                module.weight.data.fill_(0.5)


def wake(model: torch.nn.Module) -> None:
    """Let connections pass something, and the router tell images apart."""
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if 'connections' in name and isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = 0.3 * torch.rand(module.weight.shape, generator=generator)
    spread = torch.randn(model.router.fc2.weight.shape, generator=generator)
    model.router.fc2.weight.data = 0.3 * spread


def images(*sizes: tuple[int, int], annotated: bool = False, seed: int = 0) -> list[dict]:
    """Inputs as Detectron2's mappers make them."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for number, (height, width) in enumerate(sizes or ((64, 96), (96, 64), (80, 80))):
        pixels = torch.randint(0, 256, (3, height, width), generator=generator).float()
        # Unlike brightness, so that difficulties differ.
        inputs = dict(image=pixels * (0.2 + 0.4 * number), height=2 * height, width=2 * width)
        inputs['image_id'], inputs['file_name'] = number, f'{number}.jpg'
        if annotated:
            inputs |= annotations(height, width)
        batch.append(inputs)
    return batch


def annotations(height: int, width: int, bits: bool = False) -> dict:
    """Two objects of an image, with all that any detector learns from."""
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 56.0]])
    objects = Instances((height, width))
    objects.gt_boxes = Boxes(boxes)
    objects.gt_classes = torch.tensor([0, 3])
    polygons = [
        [torch.tensor([x1, y1, x2, y1, x2, y2, x1, y2]).double().numpy()]
        for x1, y1, x2, y2 in boxes.tolist()
    ]
    objects.gt_masks = PolygonMasks(polygons)
    if bits:
        objects.gt_masks = BitMasks.from_polygon_masks(objects.gt_masks, height, width)
    points = torch.stack([boxes[:, [0, 1]], boxes[:, [2, 3]], boxes[:, [0, 3]]], 1)
    points = torch.cat([points, points[:, :2]], 1) * 0.9 + 2
    objects.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 5, 1), 2.0)], 2))
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[: height // 2] = 2
    return dict(instances=objects, sem_seg=labels)


def tensors_of(result: dict) -> dict:
    """All tensors of a result, by name."""
    tensors = {}
    for name, value in result.items():
        if isinstance(value, Instances):
            for field, held in value.get_fields().items():
                tensors[f'{name}.{field}'] = getattr(held, 'tensor', held)
        elif name == 'panoptic_seg':
            tensors[name] = value[0]
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
    return tensors


def assert_equal(result: dict, wanted: dict, tolerance: float = 0.0) -> None:
    """Two results hold the same."""
    result, wanted = tensors_of(result), tensors_of(wanted)
    assert result.keys() == wanted.keys() and result
    for name, values in wanted.items():
        if tolerance:
            torch.testing.assert_close(result[name], values, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(result[name], values), name


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A built-in set of 8, 4 and 6 images, registered."""
    from detectron2.data.datasets import register_coco_instances

    from dynamicdet.datasets.digits import make_digits

    root = make_digits(tmp_path_factory.mktemp('tiny') / 'digits', dict(train=8, val=4, test=6), 64)
    for split in ('train', 'val', 'test'):
        register_coco_instances(
            f'tiny_{split}',
            dict(thing_classes=list('0123456789')),
            str(root / f'annotations/instances_{split}.json'),
            str(root / split),
        )
    return root


@pytest.fixture(scope='session')
def trained(data, tmp_path_factory):
    """Work dir of both steps."""
    from test_training import config, train

    folder = tmp_path_factory.mktemp('trained')
    train(config(folder))
    train(config(folder, step='router'))
    return folder
