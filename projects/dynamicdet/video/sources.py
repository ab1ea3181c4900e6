"""Frames, one after the other, from a video file, a folder of pictures, a camera or a network
stream.

What cannot be read is a frame without a picture, with a reason: whoever goes through a source
decides what to do.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..datasets.picture_formats import pictures_in
from ..datasets.picture_reading import read_picture
from ..errors import UsageError
from .writer import MAX_FPS, need_av

#: Frames per second where a source does not say.
DEFAULT_FPS = 25.0
#: Seconds that a network stream may take to open, and from one packet to the next.
PATIENCE = 10.0
#: Where so many frames in a row cannot be read, the rest cannot either.
MOST_FAULTS = 100


class VideoFrame(NamedTuple):
    """One frame of a source.

    Attributes:
        number (int): From 0 on, without gaps: frames that cannot be read count.
        time (float): Seconds from the first frame on, more for each frame that can be read.
        picture (ndarray, optional): (H, W, 3) uint8, BGR. None if it cannot be read.
        fault (str, optional): Why not.
        duration (float, optional): Seconds for which it is to be shown, where the source says.
    """

    number: int
    time: float
    picture: np.ndarray | None
    fault: str | None = None
    duration: float | None = None


class _Clock:
    """Times of frames, whatever a source says: from 0 on, always forward."""

    def __init__(self, fps: float) -> None:
        self._step = 1 / fps
        self._last = self._last_read = self._shift = None

    def time(self, said: float | None) -> float:
        """Of a frame that can be read, for which the source says a time, or None."""
        now = None if said is None or self._shift is None else said + self._shift
        # Of cut and joined films times start anew, or stand still: they go on from where they are.
        if now is None or self._last_read is not None and now <= self._last_read:
            now = self.time_of_fault()
            self._shift = self._shift if said is None else now - said
        self._last = self._last_read = now
        return now

    def time_of_fault(self) -> float:
        """Of a frame that cannot be read: files have it in another order."""
        self._last = 0.0 if self._last is None else self._last + self._step
        return self._last


class FrameSource:
    """Go through it once, in a ``with`` block. The classes below are its kinds; `open_source` finds
    the right one.

    Attributes:
        name (str): For messages.
        fps (float): Frames per second.
        length (int, optional): Number of frames, as far as the source says; None: not known, or
            without end.
        notes (list[str]): What is odd about it, a line each.
        ended (str, optional): After the last frame: why there are no more, if that was not
            expected.
    """

    name = ''
    fps = DEFAULT_FPS
    length: int | None = None
    ended: str | None = None
    notes: Sequence[str] = ()

    def __enter__(self) -> 'FrameSource':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        faults, clock = 0, _Clock(self.fps)
        for number, (said, picture, fault, duration) in enumerate(self._read()):
            time = clock.time(said) if fault is None else clock.time_of_fault()
            yield VideoFrame(number, time, picture, fault, duration)
            faults = 0 if fault is None else faults + 1
            if faults >= MOST_FAULTS:
                self.ended = f'{faults} frames in a row cannot be read'
                return

    def close(self) -> None:
        """Let go of what is open."""

    def _read(self) -> Iterator[tuple[float | None, np.ndarray | None, str | None, float | None]]:
        """Time (None: one frame after the one before), picture, fault and duration of each
        frame."""
        raise NotImplementedError


def open_source(source: str | int, fps: float | None = None) -> FrameSource:
    """Open a source of frames.

    Args:
        source (str or int): A video file, a folder of pictures, the number of a camera, or a URL
            such as rtsp://...
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


class Folder(FrameSource):
    """The pictures in a folder, by name; numbers in names count as numbers: 2.jpg comes before
    10.jpg."""

    def __init__(self, path: str | Path, fps: float = DEFAULT_FPS) -> None:
        if not 0 < fps < float('inf'):
            raise UsageError(f'frames per second must be above 0; got {fps}')
        self.name, self.fps = str(path), fps
        self._files = sorted(pictures_in(path), key=lambda file: _natural(file.name))
        self.length = len(self._files)

    def _read(self):
        for file in self._files:
            picture, fault = read_picture(str(file))
            yield None, picture, fault and f"'{file.name}' {fault}", None


class VideoFile(FrameSource):
    """A video file or network stream, by PyAV.

    A frame that the decoder refuses, or marks as damaged, is one that cannot be read. Films that a
    phone recorded upright are turned, and those that it mirrored are mirrored back. A preview
    picture is no film.
    """

    def __init__(self, path: str) -> None:
        av = need_av()
        self.name, self._error = path, av.error.FFmpegError
        # TCP: by UDP single packets get lost, and with them pictures.
        options = dict(rtsp_transport='tcp') if path.startswith('rtsp') else {}
        try:
            self._container = av.open(
                path, options=options, timeout=PATIENCE if '://' in path else None
            )
        except self._error as error:
            raise UsageError(f"'{path}' cannot be opened as a video: {error.strerror}") from None
        self._stream = self._film()
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or DEFAULT_FPS)
        self.length = self._stream.frames or None

    def _film(self) -> Any:
        """Of its streams the one that a player shows."""
        pictures = self._container.streams.video
        films = [
            stream
            for stream in pictures
            if not {'attached_pic', 'timed_thumbnails'} & _flags(stream)
        ]
        if not films:
            self.close()
            raise UsageError(
                f"'{self.name}' has no pictures, only "
                + ('a preview' if pictures else 'sound or text')
            )
        best = self._container.streams.best('video')
        film = next((stream for stream in films if stream.index == best.index), films[0])
        if len(films) > 1:
            self.notes = [
                f'it has {len(films)} films: the one of {film.width} x {film.height} pixels, '
                f'stream {film.index}, is looked at'
            ]
        return film

    def close(self) -> None:
        """Close the file or connection."""
        self._container.close()

    def _read(self):
        first = last = None
        count = 0
        for picture, fault in self._decoded():
            time = None if picture is None else picture.time
            if time is not None:
                first, last = time if first is None else first, time
            count += 1
            yield time, (None if fault else _upright(picture)), fault, _duration(picture)
        # The index of a trimmed film counts frames that are not shown.
        length = self._stream.duration and float(self._stream.duration * self._stream.time_base)
        shown = length and last is not None and last - first > length - 2 / self.fps
        if self.length and count < self.length and not shown and self.ended is None:
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


class Camera(FrameSource):
    """A camera of this machine, by OpenCV, until it is taken away."""

    def __init__(self, number: int) -> None:
        self.name = f'camera {number}'
        self._camera = cv2.VideoCapture(number)
        if not self._camera.isOpened():
            raise UsageError(f'there is no camera {number}, or it is in use')
        rate = self._camera.get(cv2.CAP_PROP_FPS)
        self.fps = rate if 0 < rate <= MAX_FPS else DEFAULT_FPS

    def close(self) -> None:
        """Give the camera back."""
        self._camera.release()

    def _read(self):
        while True:
            there, picture = self._camera.read()
            if not there:
                self.ended = 'it gives no more pictures'
                return
            # Drivers say a rate, and give what the light and the reader's pace allow.
            yield monotonic(), picture, None, None


def _natural(name: str) -> list:
    """For sorting: text and numbers in turn."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


def _flags(stream: Any) -> set[str]:
    """What a container says of a stream, by FFmpeg's names."""
    return {flag.name for flag in type(stream.disposition) if flag & stream.disposition}


def _duration(frame: Any) -> float | None:
    """Seconds for which a frame of PyAV is to be shown, if it says so."""
    return float(frame.duration * frame.time_base) if frame is not None and frame.duration else None


def _upright(frame: Any) -> np.ndarray:
    """A frame of PyAV as (H, W, 3) BGR, turned and mirrored as the file says, by quarters."""
    picture = frame.to_ndarray(format='bgr24')
    matrix = frame.side_data.get('DISPLAYMATRIX')
    if matrix is None:
        return np.ascontiguousarray(picture)
    # x goes to (a, b), y to (c, d), both down and to the right (ISO 14496-12, 6.2.2).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
