"""Videos, frame by frame, for detectors of single images and for those that remember.

A data set's item is a **frame** and goes through an ordinary image pipeline, so that every
detector, loader and metric of MMDetection takes it as it is. What makes it a video is in the
metainfo (name the keys in the pipeline's ``meta_keys``):

    video_id      the stream that a frame belongs to
    frame_id      frames since the video's first one: 0 starts a sequence
    video_length  frames in the video
    clip_step     0 to T - 1: place in a training clip; there only under `ClipSampler`

The order of frames is the samplers' business: `samplers.py`.
"""

import os.path as osp
from typing import NamedTuple

from mmdet.datasets import BaseVideoDataset
from mmdet.registry import DATASETS

from ..errors import UsageError
from .seeding import drawing_from


class ClipFrame(NamedTuple):
    """An index into a data set: a frame as part of a clip.

    Attributes:
        row (int): Of the frame in the data set.
        step (int): Place in the clip, 0 first.
        seed (int): The clip's: its frames are augmented alike.
    """

    row: int
    step: int
    seed: int


@DATASETS.register_module()
class VideoDataset(BaseVideoDataset):
    """Videos in CocoVID format, a frame per item, video after video and in the order of time.

    CocoVID is COCO with ``videos`` (id, name), and ``video_id`` and ``frame_id`` in each image's
    entry. A file without ``video_id``, plain COCO, is a set of videos of one frame each: so stills
    and videos can be mixed by ``ConcatDataset``.

    It takes the arguments of mmengine's ``BaseDataset``. The folder of images is
    ``data_prefix=dict(img=...)``, as of ``CocoDataset``, or ``img_path``, as of mmdet's video data
    sets. ``filter_cfg`` leaves out frames of the training: those without objects
    (``filter_empty_gt=True``), smaller ones (``min_size``), and those whose entry in the file has
    not the mark that is named (``marked='is_vid_train_frame'`` in ImageNet VID: 15 of each video).
    Clips jump over what is left out.

    Raises:
        UsageError: If no classes are given or the file lacks one of them.
    """

    def load_data_list(self) -> list[dict]:
        """Read the annotation file.

        Returns:
            list[dict]: Frames, as of ``CocoDataset``, with ``video_id``, ``frame_id`` and
                ``video_length``.
        """
        classes = self.metainfo.get('classes')
        if not classes:
            raise UsageError(
                f'{type(self).__name__} needs the classes: metainfo=dict(classes=(...))'
            )
        videos = super().load_data_list()
        if len(self.cat_ids) != len(classes):
            # mmdet numbers labels by the categories that it finds: they would be other classes'
            # numbers.
            raise UsageError(
                f"'{self.ann_file}' has {len(self.cat_ids)} of the {len(classes)} classes: give "
                'those that it has, in its order, as metainfo=dict(classes=(...))'
            )
        return [frame for video in videos for frame in _in_order(video)]

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """As mmdet's; the folder may be named as ``CocoDataset``'s is."""
        info = super().parse_data_info(raw_data_info)
        folder = self.data_prefix.get('img', self.data_prefix.get('img_path', ''))
        info['img_path'] = osp.join(folder, info['file_name'])
        return info

    def filter_data(self) -> list[dict]:
        """Leave out frames, in training alone, as ``filter_cfg`` says."""
        if self.test_mode or not self.filter_cfg:
            return self.data_list
        empty, size = (
            self.filter_cfg.get('filter_empty_gt', False),
            self.filter_cfg.get('min_size', 0),
        )
        mark = self.filter_cfg.get('marked')
        return [
            frame
            for frame in self.data_list
            if (frame['instances'] or not empty)
            and min(frame['width'], frame['height']) >= size
            and (mark is None or frame.get(mark))
        ]

    def prepare_data(self, idx: int | ClipFrame) -> dict | None:
        """A frame through the pipeline.

        Raises:
            UsageError: If the pipeline leaves out a frame of a clip.
        """
        if not isinstance(idx, ClipFrame):
            return self.pipeline(self.get_data_info(idx))
        with drawing_from(idx.seed):
            data = self.pipeline(dict(self.get_data_info(idx.row), clip_step=idx.step))
        if data is None:
            raise UsageError(
                'a pipeline must not leave out frames of a clip: give FilterAnnotations '
                'keep_empty=False, or take it out'
            )
        return data

    def get_cat_ids(self, index: int) -> list[int]:
        """Classes of the objects in a frame."""
        return [instance['bbox_label'] for instance in self.get_data_info(index)['instances']]

    def videos(self) -> dict[int, list[int]]:
        """Rows of the frames of each video that is left after filters and subsets, in the order of
        time."""
        rows: dict[int, list[int]] = {}
        for row in range(len(self)):
            rows.setdefault(self.get_data_info(row)['video_id'], []).append(row)
        return rows

    @property
    def num_all_imgs(self) -> int:
        """Number of frames."""
        return len(self)

    def get_len_per_video(self, idx: int) -> int:
        """Number of frames of the ``idx``-th video."""
        return len(list(self.videos().values())[idx])


@DATASETS.register_module()
class ImageNetVIDDataset(VideoDataset):
    """ImageNet VID, converted to CocoVID (mmtracking's ``imagenet2coco_vid`` writes these
    names)."""

    METAINFO = dict(
        classes=(
            'airplane',
            'antelope',
            'bear',
            'bicycle',
            'bird',
            'bus',
            'car',
            'cattle',
            'dog',
            'domestic_cat',
            'elephant',
            'fox',
            'giant_panda',
            'hamster',
            'horse',
            'lion',
            'lizard',
            'monkey',
            'motorcycle',
            'rabbit',
            'red_panda',
            'sheep',
            'snake',
            'squirrel',
            'tiger',
            'train',
            'turtle',
            'watercraft',
            'whale',
            'zebra',
        )
    )


def _in_order(video: dict) -> list[dict]:
    """The frames of a video by time, each with what it must know of the video."""
    frames = sorted(video['images'], key=lambda frame: frame.get('frame_id', 0))
    start = frames[0].get('frame_id', 0)
    return [
        dict(
            frame,
            video_id=video['video_id'],
            video_length=len(frames),
            frame_id=frame.get('frame_id', start + place) - start,
        )
        for place, frame in enumerate(frames)
    ]
