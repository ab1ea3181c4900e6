"""Detections compared whatever their order: by hand."""

import pytest

from dynamicdet.testing import agreement


def found(left, score=0.5, category=1):
    return dict(bbox=[left, 0.0, 10.0, 10.0], score=score, category_id=category)


def test_the_order_does_not_count():
    one = [found(0, 0.9), found(0.5, 0.9), found(30, 0.2)]
    assert agreement([one], [one[::-1]]) == (6, 0.0, 0.0, 0.0)


def test_differences_are_of_counterparts():
    """Of two that lie near, each goes to its own, though the surest lies nearer to the other."""
    same = agreement([[found(0, 0.9), found(1.5, 0.8)]], [[found(1.0, 0.88), found(2.25, 0.8)]])
    assert same.unmatched == 0 and same.box == 1.0 and same.score == pytest.approx(0.02)


@pytest.mark.parametrize('other', [found(2.5), found(0, 0.7), found(0, category=2)])
def test_what_is_far_or_of_another_class_is_no_counterpart(other):
    assert agreement([[found(0)]], [[other]]) == (2, 1.0, 0.0, 0.0)


def test_detections_count_by_image():
    assert agreement([[found(0)], []], [[], [found(0)]]).unmatched == 1
    assert agreement(
        [[found(0), found(40)], [found(0)]], [[found(0)], []]
    ).unmatched == pytest.approx(0.5)
    assert agreement([[], []], [[], []]) == (0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError):
        agreement([[]], [[], []])


def test_as_many_find_a_counterpart_as_can():
    """The nearest pair would leave two alone."""
    assert agreement([[found(0), found(2)]], [[found(2), found(3.9)]]).unmatched == 0


def test_infinite_boxes_are_equal_and_what_is_no_number_is_not():
    assert agreement([[found(float('inf'))]], [[found(float('inf'))]]) == (2, 0.0, 0.0, 0.0)
    assert agreement([[found(float('nan'))]], [[found(0)]]).unmatched == 1
    assert agreement([[found(float('inf'))]], [[found(0)]]).unmatched == 1
