"""Bins that do not grow, and the pictures of them."""

import cv2
import numpy as np
import pytest

from dynamicdet.video.overlay import colors_of, draw_frame
from dynamicdet.video.timeline import Timeline, draw_timeline


@pytest.mark.parametrize('most', [2, 3, 5, 8])
@pytest.mark.parametrize('count', [0, 1, 2, 5, 9, 100, 1000])
def test_nothing_is_lost_and_nothing_grows(most, count):
    timeline = Timeline(most)
    for number in range(count):
        if number % 10 == 3:
            timeline.add_fault(number)
        else:
            timeline.add(number, number % 3 - 1, 0.5, None if number % 2 else 2.0)
        assert len(timeline.bins) <= most
    total = timeline.total
    good = [number for number in range(count) if number % 10 != 3]
    assert (total.frames, total.faults) == (len(good), count - len(good))
    assert total.seconds == 0.5 * len(good) and total.gflops == 2.0 * sum(
        number % 2 == 0 for number in good
    )
    assert {exit: total.exits[exit] for exit in (-1, 0, 1)} == {
        exit: sum(number % 3 - 1 == exit for number in good) for exit in (-1, 0, 1)
    }
    # Each bin begins where it should, and all but the last are full.
    assert [one.time for one in timeline.bins] == list(range(0, count, timeline.per_bin))
    assert all(one.frames + one.faults == timeline.per_bin for one in timeline.bins[:-1])


def test_few_frames_have_a_bin_each():
    timeline = Timeline()
    for number in range(1000):
        timeline.add(number / 25, 0, 0.1, 1.0)
    assert len(timeline.bins) == 1000 and timeline.per_bin == 1


@pytest.mark.parametrize('frames, exits', [(0, 3), (1, 3), (40, 3), (40, 0)])
def test_a_picture_is_written(tmp_path, frames, exits):
    timeline = Timeline()
    for number in range(frames):
        timeline.add(number / 25, number % 4 - 1 if exits else None, 0.01, 1.5 if exits else None)
    timeline.add_fault(frames / 25)
    draw_timeline(timeline, tmp_path / 'new' / 't.png', exits)
    picture = cv2.imread(str(tmp_path / 'new' / 't.png'))
    # A row for exits and one for GFLOPs only where they are known; red marks for what cannot be
    # read.
    rows = 3 if exits and frames else 2 if exits else 1
    assert picture.shape[0] == round((1 + 1.8 * rows) * picture.shape[1] / 10)
    blue, green, red = np.moveaxis(picture.astype(int), 2, 0)
    # Without frames the mark lies on the frame of the axes.
    assert not frames or ((red > green + 60) & (red > blue + 60)).any()


def test_boxes_and_text_are_drawn():
    picture = np.full((100, 200, 3), 40, np.uint8)
    boxes = [
        dict(bbox=[20, 30, 60, 80], label=1, score=0.5),
        dict(bbox=[-1e9, -5, float('nan'), 1e9], label=0, score=1),
    ]
    drawn = draw_frame(
        picture, boxes, ['a', 'b'], [(0, 0, 255), (255, 0, 0)], ['one', 'two'], depth=0.5
    )
    # Enlarged twice, 16 rows for each line and 8 for the bar.
    assert drawn.shape == (2 * 16 + 8 + 200, 400, 3) and (picture == 40).all()
    assert drawn[40 + 120, 40].tolist() == [255, 0, 0]  # the left side of the first box: x = 20
    assert drawn[39, 100].tolist() == [80, 200, 80] and drawn[39, 300].tolist() == [0, 0, 0]
    assert drawn[:32].max() > 200  # text
    plain = draw_frame(np.zeros((1080, 1920, 3), np.uint8), [], [], [], ['one'])
    assert plain.shape == (1080 + 45, 1920, 3) and not plain[30:].any()


def test_colors():
    assert colors_of(['a', 'b'], [(1, 2, 3), (4, 5, 6), (7, 8, 9)]) == [(3, 2, 1), (6, 5, 4)]
    found = colors_of([str(number) for number in range(30)], 'random')
    assert len(set(found)) == 30 and all(0 <= level <= 255 for color in found for level in color)
