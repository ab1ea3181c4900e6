"""Whole videos to ranks, streams side by side, clips for training."""

import numpy as np
import pytest

from dynamicdet.datasets import samplers
from dynamicdet.datasets.video import ClipFrame
from dynamicdet.errors import UsageError


class Videos:
    """A data set of which samplers see the videos alone."""

    def __init__(self, *lengths):
        edges = np.cumsum([0, *lengths])
        self.rows = {
            10 * number: list(range(*edges[number : number + 2])) for number in range(len(lengths))
        }

    def videos(self):
        return self.rows


@pytest.fixture
def ranks(monkeypatch):
    """``ranks(rank, world)``: what mmengine says from then on."""

    def pretend(rank, world):
        monkeypatch.setattr(samplers, 'get_dist_info', lambda: (rank, world))

    return pretend


def test_videos_are_shared_out_by_length():
    assert samplers.share_out([5, 9, 1, 4], 1) == [[0, 1, 2, 3]]
    # 9 | 5, 4 | then 1 to whom comes first of 9 and 9.
    assert samplers.share_out([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]
    assert samplers.share_out([3], 3) == [[0], [], []]
    assert samplers.share_out([], 2) == [[], []]


def test_video_sampler_goes_through_all_in_order():
    sampler = samplers.VideoSampler(Videos(3, 2, 4), seed=1)
    assert list(sampler) == list(range(9)) and len(sampler) == 9


@pytest.mark.parametrize('world', [2, 3, 5])
def test_ranks_have_whole_videos_and_each_frame_once(ranks, world):
    dataset, seen = Videos(3, 2, 4, 7), []
    for rank in range(world):
        ranks(rank, world)
        sampler = samplers.VideoSampler(dataset)
        rows = list(sampler)
        assert len(rows) == len(sampler) and rows == sorted(rows)
        for video in dataset.rows.values():
            assert set(video) <= set(rows) or not set(video) & set(rows)
        seen += rows
    assert sorted(seen) == list(range(16))


def test_streams_run_side_by_side():
    batches = list(samplers.lockstep([[0, 1, 2], [], [3], [4, 5, 6, 7], [8]], 2))
    # The third takes the second one's place; in the end one is left.
    assert batches == [[0, 3], [1, 4], [2, 5], [6, 8], [7]]
    sampler = samplers.StreamBatchSampler(samplers.VideoSampler(Videos(3, 1, 4, 1)), 2)
    assert list(sampler) == [[0, 3], [1, 4], [2, 5], [6, 8], [7]] and len(sampler) == 5
    assert list(samplers.StreamBatchSampler(samplers.VideoSampler(Videos(2, 1)), 1)) == [
        [0],
        [1],
        [2],
    ]


def test_stream_batches_need_videos():
    with pytest.raises(UsageError, match='needs a VideoSampler'):
        samplers.StreamBatchSampler([0, 1], 2)
    with pytest.raises(UsageError, match='take a VideoDataset'):
        samplers.VideoSampler([1, 2])


def clips_of(sampler):
    frames = list(sampler)
    assert all(isinstance(frame, ClipFrame) for frame in frames) and len(frames) == len(sampler)
    clips = [
        frames[start : start + sampler.frames] for start in range(0, len(frames), sampler.frames)
    ]
    for clip in clips:
        assert [frame.step for frame in clip] == list(range(sampler.frames))
        assert len({frame.seed for frame in clip}) == 1
    return [[frame.row for frame in clip] for clip in clips]


def test_clips_without_gaps_do_not_overlap():
    clips = clips_of(samplers.ClipSampler(Videos(12, 3, 9), frames=4, seed=0))
    assert len(clips) == 3 + 2  # the video of three frames is too short
    assert all(np.diff(clip).tolist() == [1, 1, 1] for clip in clips)
    rows = sum(clips, [])
    assert len(set(rows)) == len(rows) and not set(rows) & {12, 13, 14}
    assert all(clip[0] // 15 == clip[-1] // 15 for clip in clips)  # never over the end of a video


def test_gaps_are_drawn():
    sampler, steps = samplers.ClipSampler(Videos(200), frames=3, gaps=(2, 4), seed=0), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        steps += [step for clip in clips_of(sampler) for step in np.diff(clip)]
    assert set(steps) == {2, 3, 4}
    assert len(clips_of(sampler)) == 200 // 7  # mean length: 1 + 2 * 3


def test_every_frame_is_reached():
    sampler, seen = samplers.ClipSampler(Videos(11), frames=3, seed=0), set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        seen |= {row for clip in clips_of(sampler) for row in clip}
    assert seen == set(range(11))


def test_short_videos_shrink_the_gaps():
    assert clips_of(samplers.ClipSampler(Videos(4), frames=4, gaps=(5, 9), seed=0)) == [
        [0, 1, 2, 3]
    ]
    assert clips_of(samplers.ClipSampler(Videos(6), frames=3, gaps=(5, 5), seed=0)) == [[0, 2, 5]]
    assert sorted(clips_of(samplers.ClipSampler(Videos(3), frames=1, seed=0))) == [[0], [1], [2]]


def test_epochs_differ_and_seeds_repeat():
    dataset = Videos(40, 30)
    first, again, other = (samplers.ClipSampler(dataset, 5, seed=seed) for seed in (3, 3, 4))
    assert list(first) == list(again) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    assert len({frame.seed for frame in first}) == len(first) // 5


@pytest.mark.parametrize('lengths, world', [((20, 20), 2), ((20, 9), 3), ((4,), 3)])
def test_ranks_have_as_many_clips(ranks, lengths, world):
    clips = []
    for rank in range(world):
        ranks(rank, world)
        mine = clips_of(samplers.ClipSampler(Videos(*lengths), 4, seed=0))
        clips.append(mine)
    assert len({len(mine) for mine in clips}) == 1
    ranks(0, 1)
    assert {tuple(clip) for mine in clips for clip in mine} == {
        tuple(clip) for clip in clips_of(samplers.ClipSampler(Videos(*lengths), 4, seed=0))
    }


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(frames=0), 'frames >= 1'),
        (dict(frames=2, gaps=(0, 1)), 'gaps 1 <='),
        (dict(frames=2, gaps=(3, 2)), 'gaps 1 <='),
        (dict(frames=9), 'no video has 9 frames'),
    ],
)
def test_mistakes_are_said(options, words):
    with pytest.raises(UsageError, match=words):
        samplers.ClipSampler(Videos(8), **options)
