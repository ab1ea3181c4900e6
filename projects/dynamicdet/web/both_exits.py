"""Pictures through both exits, once: what the viewer's slider then chooses from."""

import base64
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from ..apis import DynamicInferencer
from ..datasets.picture_reading import read_picture
from ..errors import UsageError
from ..measuring.latencies import force_dynamic_exit
from ..models import DynamicDetector
from ..timing import time_call
from ..transfers import to_host
from ..video.sources import VideoFrame, open_source

#: Pictures at a time: of more, the first are shown; of a film, so many spread over all of it.
MOST_PICTURES = 24
#: Pixels of a picture; more are refused before they are decoded. Cameras make 24 to 60 million.
MOST_PIXELS = 60_000_000
#: Longest side, in pixels, of what is shown.
_SHOWN = 1280

#: Wraps what is iterated over.
Progress = Callable[[list], Iterable]


class BothExits:
    """A detector that runs both exits of every picture.

    Args:
        detector (DynamicInferencer): Of two exits, at the budget to begin with.

    Raises:
        UsageError: If it has more exits, or looks again at regions: there is no threshold to slide.
    """

    def __init__(self, detector: DynamicInferencer) -> None:
        model = detector.model
        if not isinstance(model, DynamicDetector) or model.num_exits != 2 or model.regions:
            raise UsageError(
                'the demo shows two exits, between which a threshold chooses: this detector has '
                'another form'
            )
        if model._budget_waits:
            # It says what is missing.
            model.set_budget(model.budget)
        self._detector, self._model = detector, model
        self._device = next(model.parameters()).device
        known = bool(model.gflops.isfinite().all())
        self._about = dict(
            classes=list(detector.visualizer.dataset_meta['classes']),
            threshold=float(model.threshold),
            difficulties=model.difficulties.tolist(),
            gflops=model.gflops.tolist() if known else None,
        )
        # Whatever the difficulty, `start` need not know a threshold.
        force_dynamic_exit(model, 0)
        # The first run is slower.
        self.detect(np.full((64, 64, 3), 114, np.uint8), 'warm-up')

    def shown(self, pictures: list[Mapping[str, Any]], faults: list[str]) -> dict[str, Any]:
        """A set, as ``viewer.js`` shows it."""
        return dict(self._about, pictures=pictures, faults=faults)

    @torch.no_grad()
    def detect(self, picture: np.ndarray, name: str) -> dict[str, Any]:
        """A picture, (H, W, 3) uint8, BGR, as ``viewer.js`` takes it."""
        model = self._model
        ((_, data),) = self._detector.preprocess([picture])
        data = model.data_preprocessor(data, False)
        samples = data['data_samples']

        # Each part runs once; what an exit costs is made of those that it needs.
        begin, state = time_call(lambda: model.start(data['inputs'], samples), self._device)
        heads, easy = time_call(lambda: _found(model.finish(state)), self._device)
        rest, hard = time_call(lambda: _found(model.finish(model.deepen(state))), self._device)
        # Merged exits need what exit 0 finds, too.
        more = heads if model.merge else 0
        return dict(
            name=name,
            src=_as_url(picture),
            width=picture.shape[1],
            height=picture.shape[0],
            difficulty=float(state.difficulties[0]),
            seconds=[begin + heads, begin + more + rest],
            exits=[easy, hard],
        )

    def detect_all(
        self, pictures: Iterable[tuple[str, np.ndarray | None, str | None]], faults: list[str]
    ) -> dict[str, Any]:
        """A set of names, pictures and, in the place of a picture, why it cannot be read. What goes
        wrong with one is said in ``faults``, and does not end the others."""
        shown = []
        for name, picture, fault in pictures:
            if fault is None:
                try:
                    shown.append(self.detect(picture, name))
                except Exception as error:
                    traceback.print_exc(file=sys.stderr)
                    fault = f'cannot be detected in: {type(error).__name__}'
            if fault is not None:
                faults.append(f'{name} {fault}')
        return self.shown(shown, faults)


def read_pictures(
    paths: Iterable[str | os.PathLike],
) -> Iterator[tuple[str, np.ndarray | None, str | None]]:
    """Name, picture, and why it cannot be read, of each file."""
    for path in paths:
        fault = _size_fault(path)
        picture, fault = (None, fault) if fault else read_picture(os.fspath(path))
        yield Path(path).name, picture, fault


def _size_fault(path: str | os.PathLike) -> str | None:
    """Why a picture is not decoded: by its head, which may promise more than memory holds."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        return f'has more than {MOST_PIXELS / 1e6:.0f} million pixels'
    except Exception:
        # Pillow's decoders raise errors of many kinds. `read_picture` says what is wrong.
        return None
    if width * height > MOST_PIXELS:
        return f'has {width * height / 1e6:.0f} million pixels: {MOST_PIXELS / 1e6:.0f} are allowed'
    return None


def read_film(path: str | os.PathLike) -> list[tuple[str, np.ndarray | None, str | None]]:
    """The same of `MOST_PICTURES` frames at most, equally far apart, of a video file."""
    kept: list[VideoFrame] = []
    step = 1
    with open_source(os.fspath(path)) as frames:
        for frame in frames:
            if frame.number % step:
                continue
            kept.append(frame)
            if len(kept) > MOST_PICTURES:
                # How many there are is known at the end alone.
                kept, step = kept[::2], 2 * step
    return [(f'frame {frame.number}', frame.picture, frame.fault) for frame in kept]


def _found(samples: list) -> dict[str, list]:
    ((boxes, scores, labels),) = to_host([sample.pred_instances for sample in samples])
    return dict(boxes=boxes.tolist(), scores=scores.tolist(), labels=labels.tolist())


def _as_url(picture: np.ndarray) -> str:
    """A picture inside a page: no file is made of it."""
    factor = min(1, _SHOWN / max(picture.shape[:2]))
    if factor < 1:
        size = [max(1, round(side * factor)) for side in picture.shape[1::-1]]
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    content = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    return 'data:image/jpeg;base64,' + base64.b64encode(content).decode()
