"""What YOLOv5 and YOLOv7 share, by hand-made cases."""

import math

import pytest
import torch
from torch import nn

from dynamicdet.models.yolo import AnchorHead, candidate_cells, ciou, concatenate_maps, conv


def test_ciou_by_hand():
    same = torch.tensor([[5.0, 5, 4, 2]])
    torch.testing.assert_close(ciou(same, same), torch.ones(1))
    # Side by side, not touching: no overlap, centers 4 apart, hull 6 x 2, same shape.
    apart = ciou(torch.tensor([[1.0, 1, 2, 2]]), torch.tensor([[5.0, 1, 2, 2]]))
    torch.testing.assert_close(apart, torch.tensor([-16 / 40]))
    # One center, 4 x 2 in 4 x 4: half overlaps; the angle's term weighs itself.
    shape = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    wanted = 0.5 - shape * shape / (shape + 0.5)
    torch.testing.assert_close(
        ciou(torch.tensor([[4.0, 4, 4, 2]]), torch.tensor([[4.0, 4, 4, 4]])), torch.tensor([wanted])
    )


def test_candidates_are_three_cells_of_the_anchors_that_fit():
    # Center at column 2.25, row 3.75 of stride 8: its cell, and those to the left and below.
    boxes = torch.tensor([[18.0, 30, 16, 16]])
    anchors = torch.tensor([[16.0, 16], [5.0, 16], [3.0, 16]])
    anchor, row, column, owner = candidate_cells(boxes, anchors, 8, (10, 10), 4.0)
    assert owner.tolist() == [0] * 6
    cells = sorted(zip(anchor.tolist(), row.tolist(), column.tolist()))
    assert cells == [(a, r, c) for a in (0, 1) for r, c in ((3, 1), (3, 2), (4, 2))]


def test_candidates_at_the_border_stay_inside():
    boxes = torch.tensor([[0.5, 79.9, 16, 16]])
    _, row, column, _ = candidate_cells(boxes, torch.tensor([[16.0, 16]]), 8, (10, 10), 4.0)
    assert list(zip(row.tolist(), column.tolist())) == [(9, 0)]


def test_candidates_know_their_objects():
    """Two objects in one cell: the second is too large for the anchor's four times."""
    boxes = torch.tensor([[12.0, 12, 8, 8], [12, 12, 40, 8], [12, 12, 16, 16]])
    anchor, row, column, owner = candidate_cells(boxes, torch.tensor([[8.0, 8]]), 8, (4, 4), 4.0)
    assert list(zip(anchor.tolist(), row.tolist(), column.tolist(), owner.tolist())) == [
        (0, 1, 1, 0),
        (0, 1, 1, 2),
    ]


def test_join_doubles_the_smaller_maps():
    small, large = torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.zeros(1, 2, 4, 4)
    joined = concatenate_maps([small, large])
    assert joined[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert joined.shape == (1, 3, 4, 4) and not joined[0, 1:].any()
    assert torch.equal(concatenate_maps([large, small])[0, 2], joined[0, 0])
    assert concatenate_maps([small]) is small


@pytest.mark.parametrize('kernel, stride, side', [(1, 1, 8), (3, 1, 8), (3, 2, 4), (6, 2, 4)])
def test_convolutions_keep_the_size_but_for_the_stride(kernel, stride, side):
    assert conv(1, 1, kernel, stride)(torch.zeros(2, 1, 8, 8)).shape[2:] == (side, side)


class Head(AnchorHead):
    """Without a way to match."""

    def _match(self, *_):
        raise AssertionError


def test_decoding_by_hand():
    """Center (2 s - 0.5 + cell) * stride, sides (2 s)^2 * anchor, where s is the sigmoid."""
    head = Head(2, (8, 8), [[(10, 13), (16, 30)], [(60, 60), (100, 40)]], {})
    three_quarters = math.log(3)
    raw = torch.tensor(
        [
            [0.0, 0, 0, 0],
            [three_quarters, -three_quarters, three_quarters, -three_quarters],
            [100, -100, -100, 100],
        ]
    )
    found = head.decode(
        raw, 1, torch.tensor([0, 1, 1]), torch.tensor([2, 0, 3]), torch.tensor([1, 4, 0])
    )
    torch.testing.assert_close(
        found,
        torch.tensor(
            [
                [1.5 * 16, 2.5 * 16, 60, 60],  # the cell's middle, the anchor itself
                [5 * 16, 0, 2.25 * 100, 0.25 * 40],  # a cell further right, none down
                [
                    1.5 * 16,
                    2.5 * 16,
                    0,
                    160,
                ],  # as far as it reaches: 1.5 and -0.5 cells, 0 and 4 times
            ]
        ),
    )
    assert not list(head.buffers())[0].requires_grad and 'anchors' not in head.state_dict()


def test_a_fresh_head_expects_few_objects_and_equal_classes():
    head = Head(10, (4,), [[(10, 13), (16, 30)]], {})
    nn.init.zeros_(head.convs[0].bias)
    head.init_weights()
    bias = head.convs[0].bias
    assert not bias[:8].any()
    # Eight objects on 80 x 80 cells; the classes share 0.6.
    torch.testing.assert_close(bias[8:10].exp() * 80 * 80, torch.full((2,), 8.0))
    torch.testing.assert_close(bias[10:].exp() * 9.01, torch.full((20,), 0.6))
