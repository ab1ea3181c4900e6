"""Frames, one after the other, from a video file, a folder of pictures, a camera or a network stream.

What cannot be read is a frame without a picture, with a reason: whoever goes through a source decides what to
do.
"""
import os
import re
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Tuple, Union

import cv2
import numpy as np

from ..apis.inferencer import picture_fault
from ..datasets.picture_formats import has_picture_suffix, picture_suffixes
from ..errors import UsageError
from .writer import need_av

#: Frames per second where a source does not say.
DEFAULT_FPS = 25.0
#: Seconds that a network stream may take to open, and from one packet to the next.
PATIENCE = 10.0
#: Where so many frames in a row cannot be read, the rest cannot either.
MOST_FAULTS = 100


class Frame(NamedTuple):
    """One frame of a source.

    Attributes:
        number (int): From 0 on, without gaps: frames that cannot be read count.
        time (float): Seconds from the first frame on.
        picture (ndarray, optional): (H, W, 3) uint8, BGR. None if it cannot be read.
        fault (str, optional): Why not.
    """
    number: int
    time: float
    picture: Optional[np.ndarray]
    fault: Optional[str] = None


class Source:
    """Go through it once, in a ``with`` block. The classes below are its kinds; `open_source` finds the right
    one.

    Attributes:
        name (str): For messages.
        fps (float): Frames per second.
        length (int, optional): Number of frames, as far as the source says; None: not known, or without end.
        ended (str, optional): After the last frame: why there are no more, if that was not expected.
    """
    name = ''
    fps = DEFAULT_FPS
    length: Optional[int] = None
    ended: Optional[str] = None

    def __enter__(self) -> 'Source':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        faults = 0
        for number, (time, picture, fault) in enumerate(self._read()):
            yield Frame(number, number / self.fps if time is None else time, picture, fault)
            faults = 0 if fault is None else faults + 1
            if faults >= MOST_FAULTS:
                self.ended = f'{faults} frames in a row cannot be read'
                return

    def close(self) -> None:
        """Let go of what is open."""

    def _read(self) -> Iterator[Tuple[Optional[float], Optional[np.ndarray], Optional[str]]]:
        """Time (None: by number and rate), picture and fault of each frame."""
        raise NotImplementedError


def open_source(source: Union[str, int], fps: Optional[float] = None) -> Source:
    """Open a source of frames.

    Args:
        source (str or int): A video file, a folder of pictures, the number of a camera, or a URL such as
            rtsp://...
        fps (float, optional): Frames per second of a folder. Defaults to 25.

    Raises:
        UsageError: If there is none, or it cannot be opened.
    """
    text = str(source)
    if re.fullmatch(r'\d+', text) and not os.path.exists(text):
        return Camera(int(text))
    if os.path.isdir(text):
        return Folder(text, DEFAULT_FPS if fps is None else fps)
    if '://' in text or os.path.isfile(text):
        return VideoFile(text)
    raise UsageError(f"there is no video, folder, camera or stream '{text}'")


class Folder(Source):
    """The pictures in a folder, by name; numbers in names count as numbers: 2.jpg comes before 10.jpg."""

    def __init__(self, path: Union[str, Path], fps: float = DEFAULT_FPS) -> None:
        if not 0 < fps < float('inf'):
            raise UsageError(f'frames per second must be above 0; got {fps}')
        self.name, self.fps = str(path), fps
        self._files = sorted((file for file in Path(path).iterdir() if has_picture_suffix(file)),
                             key=lambda file: _natural(file.name))
        if not self._files:
            raise UsageError(f"there is no picture in '{path}': looked for {', '.join(picture_suffixes())}")
        self.length = len(self._files)

    def _read(self):
        for file in self._files:
            fault = picture_fault(str(file))
            picture = None if fault else cv2.imread(str(file))
            yield None, picture, fault and f"'{file.name}' {fault}"


class VideoFile(Source):
    """A video file or network stream, by PyAV.

    A frame that the decoder refuses, or marks as damaged, is one that cannot be read. Films that a phone
    recorded upright are turned.
    """

    def __init__(self, path: str) -> None:
        av = need_av()
        self.name, self._error = path, av.error.FFmpegError
        # TCP: by UDP single packets get lost, and with them pictures.
        options = dict(rtsp_transport='tcp') if path.startswith('rtsp') else {}
        try:
            self._container = av.open(path, options=options, timeout=PATIENCE if '://' in path else None)
        except self._error as error:
            raise UsageError(f"'{path}' cannot be opened as a video: {error.strerror}") from None
        if not self._container.streams.video:
            self.close()
            raise UsageError(f"'{path}' has no pictures, only sound or text")
        self._stream = self._container.streams.video[0]
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or DEFAULT_FPS)
        self.length = self._stream.frames or None

    def close(self) -> None:
        self._container.close()

    def _read(self):
        start, count = None, 0
        for picture, fault in self._decoded():
            time = picture.time if picture is not None else None
            start = time if start is None else start
            count += 1
            yield (None if time is None else time - start), (None if fault else _upright(picture)), fault
        if self.length and count < self.length and self.ended is None:
            self.ended = f'it ended after {count} of {self.length} frames'

    def _decoded(self) -> Iterator[tuple]:
        """Pictures as PyAV gives them, or None, and faults."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except self._error as error:
                self.ended = f'it broke off: {error.strerror}'
                return
            try:
                for picture in packet.decode():
                    yield picture, 'is damaged' if picture.is_corrupt else None
            except self._error as error:
                yield None, f'cannot be decoded: {error.strerror}'


class Camera(Source):
    """A camera of this machine, by OpenCV, until it is taken away."""

    def __init__(self, number: int) -> None:
        self.name = f'camera {number}'
        self._camera = cv2.VideoCapture(number)
        if not self._camera.isOpened():
            raise UsageError(f'there is no camera {number}, or it is in use')
        self.fps = self._camera.get(cv2.CAP_PROP_FPS) or DEFAULT_FPS

    def close(self) -> None:
        self._camera.release()

    def _read(self):
        while True:
            there, picture = self._camera.read()
            if not there:
                self.ended = 'it gives no more pictures'
                return
            yield None, picture, None


def _natural(name: str) -> list:
    """For sorting: text and numbers in turn."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def _upright(frame) -> np.ndarray:
    """A frame of PyAV as (H, W, 3) BGR, turned as the file says."""
    picture = frame.to_ndarray(format='bgr24')
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90) % 4))
