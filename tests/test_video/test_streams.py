"""What is remembered of streams."""

import pytest
import torch

from dynamicdet.video.streams import (
    GRID,
    Streams,
    as_frames,
    clip_numbers,
    early_change,
    early_summary,
    is_cut,
    part_changes,
    stream_waves,
)
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample, TrackDataSample


def sample(video=None, frame=None, **meta):
    given = dict(video_id=video, frame_id=frame)
    return DetDataSample(
        metainfo={**{name: one for name, one in given.items() if one is not None}, **meta}
    )


def test_a_stream_goes_on():
    streams = Streams(4)
    (first,) = streams.at([sample('a', 0)], (64, 64))
    first.early = torch.zeros(1)
    # Frames may be left out; another stream does not disturb.
    streams.at([sample('b', 7)], (64, 64))
    (again,) = streams.at([sample('a', 5)], (64, 64))
    assert again is first and again.frame == 5


@pytest.mark.parametrize(
    'meta, shape',
    [(dict(frame=4), (64, 96)), (dict(frame=4, img_shape=(60, 64)), (64, 64))],
    ids=['another size', 'another size without the padding'],
)
def test_a_frame_of_another_size_is_a_change_and_nothing_is_lost(meta, shape):
    streams = Streams(4)
    (first,) = streams.at([sample('a', 3)], (64, 64))
    first.early, first.detections, first.memories = torch.zeros(1), 'found', {0: 'a map'}
    (again,) = streams.at([sample('a', **meta)], shape)
    assert again is first and again.early is None and again.frame == 4
    assert (again.detections, again.memories) == ('found', {0: 'a map'})
    again.early = torch.ones(1)
    assert streams.at([sample('a', **dict(meta, frame=5))], shape)[0].early is not None


@pytest.mark.parametrize('frame', [0, 3, 2], ids=['a new sequence', 'the same frame', 'back'])
def test_a_stream_begins_anew(frame):
    streams = Streams(4)
    (first,) = streams.at([sample('a', 3)], (64, 64))
    (again,) = streams.at([sample('a', frame)], (64, 64))
    assert again is not first and len(streams) == 1


def test_without_a_stream_nothing_is_remembered():
    streams = Streams(4)
    one, other = streams.at([sample(), sample()], (64, 64))
    assert one is not other and len(streams) == 0


def test_frames_without_numbers_are_counted():
    streams = Streams(4)
    assert [streams.at([sample('a')], (64, 64))[0].frame for _ in range(3)] == [0, 1, 2]


def test_streams_are_forgotten_when_there_are_too_many_or_by_name():
    streams = Streams(2)
    a, b = streams.at([sample('a', 0), sample('b', 0)], (64, 64))
    streams.at([sample('a', 1)], (64, 64))
    streams.at([sample('c', 0)], (64, 64))
    # The one without a frame for longest.
    assert streams.at([sample('a', 2)], (64, 64))[0] is a and len(streams) == 2
    assert streams.at([sample('b', 1)], (64, 64))[0] is not b
    streams.at([sample(name, 0) for name in 'defg'], (64, 64))
    assert len(streams) == 4  # all of a batch
    streams.forget('d')
    streams.forget('unknown')
    assert len(streams) == 3
    streams.forget()
    assert len(streams) == 0


def test_waves_keep_each_streams_order():
    assert stream_waves(['a', 'b', 'a', None, None, 'a', 'b']) == [[0, 1, 3, 4], [2, 6], [5]]
    assert stream_waves([]) == []


def test_clips_begin_at_step_0():
    steps = [0, 1, 0, 1, 2, None, None, 0]
    samples = [sample(**({} if step is None else dict(clip_step=step))) for step in steps]
    assert clip_numbers(samples) == [0, 0, 1, 1, 1, 2, 3, 4]


def test_clips_as_mmdet_gives_them():
    """Through mmdet's own preprocessor: two clips of three frames."""
    tracks = []
    for video in range(2):
        track = TrackDataSample()
        track.video_data_samples = [sample(video, frame, img_shape=(40, 64)) for frame in range(3)]
        tracks.append(track)
    processor = MODELS.build(
        dict(type='TrackDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, pad_size_divisor=32)
    )
    data = processor(
        dict(inputs=[torch.full((3, 3, 40, 64), video) for video in range(2)], data_samples=tracks)
    )
    inputs, samples = as_frames(data['inputs'], data['data_samples'])
    assert inputs.shape == (6, 3, 64, 64)
    assert (inputs[:3] == 0).all() and (inputs[3:, :, :40] == 1 / 255).all()
    assert [(one.video_id, one.frame_id, one.clip_step) for one in samples] == [
        (video, frame, frame) for video in range(2) for frame in range(3)
    ]
    assert samples[4] is data['data_samples'][1].video_data_samples[1]
    images, same = as_frames(inputs, samples)
    assert images is inputs and same == samples


# Change.


def test_change_by_hand():
    one, other = torch.zeros(2, 2, GRID, GRID), torch.zeros(2, 2, GRID, GRID)
    one[:, 0], one[:, 1], other[:, 0], other[:, 1] = 1, -2, 1, -2
    other[1, :, 3, 4] = torch.tensor([2.0, -1.0])
    parts = part_changes(early_summary(one), early_summary(other))
    # Of (1, -2) and (2, -1): (1 + 1) / (1 + 2 + 2 + 1).
    assert parts[0].abs().max() == 0 and parts[1].reshape(GRID, GRID)[3, 4] == pytest.approx(1 / 3)
    assert early_change(early_summary(one), early_summary(other)).tolist() == pytest.approx(
        [0, 1 / 3]
    )
    # Of all parts in the mean it is little: no cut.
    mean = 1 / 3 / GRID**2
    cuts = [
        is_cut(early_summary(one), early_summary(other), share * mean).tolist()
        for share in (0.9, 1.1)
    ]
    assert cuts == [[False, True], [False, False]]


def test_change_has_its_limits():
    one = early_summary(torch.randn(3, 4, 13, 9))
    assert early_change(one, one).tolist() == [0] * 3
    assert early_change(one, -one).tolist() == pytest.approx([1] * 3)
    nothing = torch.zeros_like(one)
    assert early_change(nothing, nothing).tolist() == [0] * 3
    assert early_change(one, nothing).tolist() == pytest.approx([1] * 3)
    assert early_change(one, 2 * one).tolist() == pytest.approx([1 / 3] * 3)
