"""H.264 files, frame by frame."""

import math
import os
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np

from ..errors import UsageError, import_optional

#: Frames per second that a file may have.
MAX_FPS = 1000
#: Ticks per second of a film's clock, at least: times are right to a tenth of a millisecond.
_CLOCK = 10_000
#: x264's quality, 0 (lossless) to 51; below 20 no difference is seen at this size of boxes and
#: text.
CRF = 20


def need_av() -> ModuleType:
    """PyAV, an optional library."""
    return import_optional('av', 'video files', 'video')


class VideoWriter:
    """Write an H.264 file (mp4, yuv420p). Use it in a ``with`` block.

    It is written under another name and gets its own when it is complete; also when the block ends
    by an error, since the frames until then are good. A run that is killed leaves ``.NAME.part``,
    which players open up to the last key frame, at most 250 frames before, if it is ``fragmented``.

    Args:
        path (str or Path): File to write; an older one is replaced.
        fps (float): Frames per second, where `write` is given no times. Defaults to 25.
        fragmented (bool): Whether the index is written in pieces as frames come. Players then see
            the length of the file late. Defaults to False.

    Raises:
        UsageError: If PyAV is missing, the rate is not above 0, or the file cannot be written.
    """

    def __init__(self, path: str | Path, fps: float = 25, fragmented: bool = False) -> None:
        self._av = need_av()
        # Not `fps <= 0`, which lets NaN pass.
        if not 0 < fps <= MAX_FPS:
            raise UsageError(f'frames per second must be above 0 and at most {MAX_FPS}; got {fps}')
        self.path, self.size = Path(path), None  # type: Path, Optional[Tuple[int, int]]
        self._part = self.path.with_name(f'.{self.path.name}.part')
        self._rate, self._fragmented = Fraction(fps).limit_denominator(1001), fragmented
        #: Ticks from frame to frame.
        self._step = math.ceil(_CLOCK / self._rate)
        self._tick = 1 / (self._rate * self._step)
        self._last, self._last_step = -self._step, self._step
        self._container = self._stream = None

    def __enter__(self) -> 'VideoWriter':
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(
        self, frame: np.ndarray, time: float | None = None, duration: float | None = None
    ) -> None:
        """Append a frame.

        Args:
            frame (ndarray): (H, W, 3) uint8, BGR. The first one sets the size of the video: later
                ones of another size are fitted into it, with black borders. H.264 needs even sizes:
                an odd one is made even by repeating the last row or column.
            time (float, optional): Seconds from the start of the film at which it is shown; after
                that of the frame before. Defaults to one frame later, by ``fps``.
            duration (float, optional): Seconds for which it is shown, if it is the last one.
                Defaults to one frame.
        """
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
            raise UsageError(f'a frame is (H, W, 3) of uint8; got {frame.shape} of {frame.dtype}')
        if self._stream is None:
            self._open(frame.shape[:2])
        frame = _fit(frame, self.size)
        odd = [(0, side % 2) for side in self.size]
        frame = np.pad(frame, (*odd, (0, 0)), mode='edge') if any(map(any, odd)) else frame
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format='bgr24')
        ticks = (
            self._last + self._step
            if time is None
            else max(self._last + 1, round(time / self._tick))
        )
        self._last, self._last_step = (
            ticks,
            self._step if not duration else max(1, round(duration / self._tick)),
        )
        picture.pts, picture.time_base = ticks, self._tick
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        """Write what is still in the encoder, and give the file its name. Without a frame there is
        no file."""
        if self._container is None:
            return
        container, self._container = self._container, None
        packets = self._stream.encode(None)
        if packets:
            packets[-1].duration = self._last_step
        container.mux(packets)
        container.close()
        os.replace(self._part, self.path)

    def _open(self, size: tuple[int, int]) -> None:
        options = dict(movflags='frag_keyframe+delay_moov') if self._fragmented else {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._container = self._av.open(str(self._part), 'w', format='mp4', options=options)
        except OSError as error:
            raise UsageError(
                f"'{self.path}' cannot be written: {error.strerror or error}"
            ) from error
        self.size = size
        # One thread: the same bytes on any number of cores, and none taken from the detector. No
        # frames that wait for later ones: a fragmented film would begin late by them, and where a
        # pause follows by all of it.
        self._stream = self._container.add_stream(
            'libx264',
            rate=self._rate,
            options=dict(crf=str(CRF), preset='veryfast', threads='1', bf='0'),
        )
        self._stream.codec_context.time_base = self._tick
        self._stream.height, self._stream.width = (side + side % 2 for side in size)
        self._stream.pix_fmt = 'yuv420p'


def _fit(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale a frame into another size, (height, width), in the middle of black."""
    if frame.shape[:2] == size:
        return frame
    scale = min(size[0] / frame.shape[0], size[1] / frame.shape[1])
    height, width = (
        max(1, min(most, round(side * scale))) for side, most in zip(frame.shape[:2], size)
    )
    fitted = np.zeros((*size, 3), np.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    small = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    fitted[top : top + height, left : left + width] = small
    return fitted
