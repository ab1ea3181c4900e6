"""What the heads learn from the detector's own output."""

import math

import pytest
import torch
from exit_cases import base, frames, tiny

from dynamicdet.errors import UsageError
from dynamicdet.models.yolov5 import YOLOV5Head
from dynamicdet.video import ExitHead
from dynamicdet.video.distillation import Distillation, Lesson, distillation_losses, make_lesson

ANCHORS = [[(8, 8)], [(16, 16)], [(32, 32)]]


def teacher(*sure):
    """A head and maps of 64 x 64 pixels in which it is sure, by objectness, of some cells: (image,
    level, row, column, logit). Everywhere a box is its anchor in the middle of the cell, of class 1
    with probability 0.9."""
    head = YOLOV5Head(2, 'n', 0.25, anchors=ANCHORS)
    maps = [
        torch.zeros(2, conv.in_channels, 8 >> level, 8 >> level)
        for level, conv in enumerate(head.convs)
    ]
    logit = math.log(9)
    for conv in head.convs:
        torch.nn.init.zeros_(conv.weight)
        conv.weight.data[4, 0] = 1
        conv.bias.data = torch.tensor([0.0, 0, 0, 0, -20, -logit, logit])
    for image, level, row, column, value in sure:
        maps[level][image, 0, row, column] = 20 + value
    return head, maps


def test_a_lesson_by_hand():
    lesson = make_lesson(
        *teacher((0, 0, 1, 2, 2.0), (1, 2, 1, 0, 0.0), (1, 0, 0, 0, -3.0)), Distillation()
    )
    # The third is below 0.1.
    assert lesson.image.tolist() == [0, 1]
    assert lesson.boxes.tolist() == [[20, 12, 8, 8], [16, 48, 32, 32]]
    assert lesson.objectness.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0.5])
    assert lesson.classes.tolist() == [pytest.approx([0.1, 0.9])] * 2


def test_each_object_teaches_once():
    """Level 0 and level 1 have boxes of the same place, of 8 x 8 pixels and, at level 1, of 16 x
    16."""
    head, maps = teacher((0, 0, 1, 1, 1.0), (0, 0, 1, 2, 3.0))
    head.anchors[0] = 80.0
    lesson = make_lesson(head, maps, Distillation())
    assert lesson.objectness.tolist() == pytest.approx([1 / (1 + math.exp(-3))])
    every = make_lesson(head, maps, Distillation(nms_iou=0.99))
    assert len(every.image) == 2
    assert len(make_lesson(head, maps, Distillation(nms_iou=0.99, max_boxes=1)).image) == 1


def student():
    return ExitHead(2, 8, 8, [(8, 8)], channels=4)


def raw():
    return [[torch.zeros(2, own, 8, 8, requires_grad=True)] for own in (2, 4, 1)]


def lesson(*rows):
    image, boxes, objectness, classes = zip(*rows) if rows else ((), (), (), ())
    return Lesson(
        torch.tensor(image, dtype=torch.long),
        torch.tensor(boxes).reshape(-1, 4).float(),
        torch.tensor(objectness).float(),
        torch.tensor(classes).reshape(-1, 2).float(),
    )


def test_losses_by_hand():
    """The student's boxes are right; it says 0.5 to everything."""
    losses = distillation_losses(
        student(), raw(), lesson((0, [20, 12, 8, 8], 0.5, [0.1, 0.9])), Distillation(weight=2)
    )
    assert losses['loss_distill_bbox'].item() == pytest.approx(0, abs=1e-5)
    # Cross entropy of a coin with anything is log 2; times 0.5, the objectness; 3 levels' worth;
    # weight 2.
    assert losses['loss_distill_cls'].item() == pytest.approx(
        2 * 3 * 0.5 * 2 / 80 * 0.5 * math.log(2), rel=1e-5
    )
    assert losses['loss_distill_obj'].item() == pytest.approx(2 * 3 * 0.01 * math.log(2), rel=1e-5)


def test_where_and_how_much_is_learned():
    outputs = raw()
    own = lesson((1, [20, 12, 8, 8], 0.8, [0.0, 1]), (1, [20, 12, 8, 8], 0.3, [0.0, 1]))
    sum(distillation_losses(student(), outputs, own, Distillation()).values()).backward()
    objects = outputs[2][0].grad
    # The surest of a cell's objects counts: 0.5 must go up to 0.8 there, down everywhere else.
    assert (objects < 0).nonzero().tolist() == [[1, 0, 1, 2]]
    assert objects[1, 0, 1, 2] / objects[0, 0, 0, 0] == pytest.approx(-0.3 / 0.5, rel=1e-4)
    assert outputs[0][0].grad.abs().sum(dim=1).nonzero().tolist() == [[1, 1, 2]]


def test_nothing_to_learn():
    outputs = raw()
    losses = distillation_losses(student(), outputs, lesson(), Distillation())
    sum(losses.values()).backward()
    assert (
        losses['loss_distill_bbox'] == losses['loss_distill_cls'] == 0 < losses['loss_distill_obj']
    )
    assert all(part[0].grad.isfinite().all() for part in outputs)
    assert len(make_lesson(*teacher(), Distillation()).image) == 0


def test_the_teacher_does_not_learn_from_it():
    """Without annotations' losses, from which it learns."""
    model = tiny(distillation=dict(weight=1.0, min_objectness=0.3)).train()
    losses = model.loss(*frames((1,), (2,)))
    names = [name for name in losses if 'distill' in name]
    assert len(names) == 3 * 4 and not [name for name in names if name.startswith('final')]
    sum(losses[name] for name in names).backward()
    assert all(own.grad is None for own in model.detector.bbox_head.parameters())
    assert all(own.grad is not None for own in model.heads.parameters())
    # Through the layers' maps it reaches the layers, all but those behind the last head.
    assert model.detector.backbone.layers['0'].conv.weight.grad is not None
    assert model.detector.neck.layers['23'].main_conv.conv.weight.grad is None


def test_a_detector_without_such_a_head_is_named():
    model = tiny(distillation=dict(weight=1.0))
    model.detector.bbox_head = torch.nn.Identity()
    with pytest.raises(UsageError, match='anchor head'):
        model.train().loss(*frames((1,)))
    assert base().bbox_head.type == 'YOLOV5Head'
