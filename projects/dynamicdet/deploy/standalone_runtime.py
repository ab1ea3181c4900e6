"""Detect objects in images: ``python runtime.py IMAGE.jpg``, or ``Detector(folder)(image)``. Needs
numpy and onnxruntime alone, and Pillow to read files. Copied by DynamicDet's tools/export.py."""

import argparse
import hashlib
import json
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import onnxruntime

FORMAT, VERSION, ABOUT = 'dynamicdet.standalone', 1, 'detector.json'
#: Boxes, (D, 4), left, top, right, bottom in pixels; scores and labels, (D,), best first; masks of
#: boxes, see `pasted`, and the difficulty in [0, 1], where there are such; and the exit, 0 or 1.
Detections = namedtuple('Detections', 'boxes scores labels masks difficulty exit')


class Detector:
    """A folder's detector; ValueError if there is none. ``threads``: 0 for all cores."""

    def __init__(self, folder, threads=0, providers=('CPUExecutionProvider',)):
        try:
            self.about = json.loads((Path(folder) / ABOUT).read_text(encoding='utf-8'))
            known = f'{self.about["format"]} version {self.about["version"]}'
        except (OSError, ValueError, TypeError, KeyError):
            raise ValueError(f"'{folder}' holds no detector: it has no whole {ABOUT}") from None
        if known != (wanted := f'{getattr(self, "FORMAT", FORMAT)} version {VERSION}'):
            raise ValueError(f"'{folder}' is of {known}, not {wanted}: export it again")
        self.sessions, options = [], onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        for name, digest in self.about['graphs'].items():
            data = file.read_bytes() if (file := Path(folder) / name).is_file() else b''
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"'{file}' is missing or was changed: export the detector again")
            self.sessions.append(onnxruntime.InferenceSession(data, options, providers=providers))

    def __call__(self, image, threshold=None, hard_share=None):
        """Detections in an image, (H, W, 3), uint8, in the order blue, green, red. The threshold in
        [-1, 1], or the share of hard images in [0, 1], is the budget: by default the folder's."""
        if getattr(image, 'dtype', None) != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise ValueError('an image must be an array of uint8, (height, width, 3)')
        threshold = self.threshold_for(threshold, hard_share)
        delivered, scale = self.deliver(image)
        return self.run(delivered.transpose(2, 0, 1), scale, image.shape[:2], threshold)

    def run(self, delivered, *frame):
        """Detections in an image, (3, h, w), that was resized by factors of width and height from
        an original height and width, and padded, as `deliver` does; the threshold comes last."""
        values = dict(image=delivered[None], difficulty=[np.nan])
        values.update(zip(('scale', 'original', 'threshold'), [np.array(x, 'f') for x in frame]))
        for session in self.sessions:
            feed = {entry.name: values[entry.name] for entry in session.get_inputs()}
            values.update(zip([one.name for one in session.get_outputs()], session.run(None, feed)))
            if not (hard := bool(values['difficulty'][0] > values['threshold'])):
                break
        difficulty = None if frame[2] is None else float(values['difficulty'][0])
        return Detections(*map(values.get, Detections._fields[:4]), difficulty, int(hard))

    def threshold_for(self, threshold=None, hard_share=None):
        """The difficulty above which images are hard, of a budget; ValueError if it is none."""
        if threshold is not None and hard_share is not None:
            raise ValueError('give a threshold or a hard share, not both')
        if self.about['threshold'] is None and (threshold, hard_share) != (None, None):
            raise ValueError('this detector is not dynamic: it has no threshold and no hard share')
        if hard_share is None:
            threshold = self.about['threshold'] if threshold is None else threshold
            if threshold is None or -1 <= threshold <= 1:
                return threshold
            raise ValueError(f'a threshold must be in [-1, 1], got {threshold}')
        if not 0 <= hard_share <= 1 or not self.about['difficulties']:
            raise ValueError(f'a hard share is in [0, 1], of a calibrated model; got {hard_share}')
        known = np.sort(np.float32(self.about['difficulties']))
        cuts = np.array([0, *np.flatnonzero(np.diff(known)) + 1, len(known)])
        easy = cuts[np.argmin(np.abs(cuts - (1 - hard_share) * len(known)))]
        if easy in (0, len(known)):
            return 1.0 if easy else -1.0
        middle = np.float32((known[easy - 1] + known[easy]) / 2)
        return float(middle if known[easy - 1] <= middle < known[easy] else known[easy - 1])

    def deliver(self, image):
        """An image as the detector was tested: resized, padded; the factors of its sides."""
        size = old = image.shape[1::-1]
        if resize := self.about['resize']:
            factor = min(a / b for a, b in zip(sorted(resize['scale']), sorted(old)))
            shrunk = [max(1, int(side * factor + 0.5)) for side in old]
            size = shrunk if resize['keep_ratio'] else resize['scale']
            image = resized(image, *size)
        if pad := self.about['pad']:
            step, sides = pad['divisor'], pad['size'] or [max(size) if pad['square'] else 0] * 2
            sides = [-(-max(pair) // step) * step for pair in zip(size, sides)]
            small, image = image, np.full((sides[1], sides[0], 3), pad['value'], np.uint8)
            image[: size[1], : size[0]] = small
        return image, (size[0] / old[0], size[1] / old[1])


def resized(image, width, height):
    """An image with other sides, bilinear: what OpenCV makes of it, but for a gray level."""
    for axis, (old, new) in enumerate(zip(image.shape, (height, width))):
        low = (at := np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)).astype(int)
        share = np.float32(at - low).reshape(-1, *[1] * (2 - axis))
        high = image.take(np.minimum(low + 1, old - 1), axis)
        image = image.take(low, axis) * (1 - share) + high * share
    return np.rint(image).astype(np.uint8)


def pasted(mask, box, height, width):
    """A box's mask on an image, (height, width): inside where it is `mask_threshold` or more."""
    for size, low, high in ((height, box[1], box[3]), (width, box[0], box[2])):
        at = (np.arange(size) + 0.5 - low) / max(high - low, 1e-6) * len(mask) - 0.5
        mask = (np.maximum(0, 1 - np.abs(at[:, None] - np.arange(len(mask)))) @ mask).T
    return mask


def read_image(path):
    """A picture file as an array, (H, W, 3), blue first; ValueError if it is none, or damaged."""
    try:
        from PIL import Image, ImageOps

        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert('RGB'))[..., ::-1]
    except Exception as error:  # Pillow's decoders raise errors of many kinds.
        raise ValueError(f"Pillow cannot read '{path}' as a picture: {error}") from None


def main(kind=Detector):
    """The command line."""
    parser = argparse.ArgumentParser(description='Detect objects in a picture.')
    parser.add_argument('image', help='picture file')
    parser.add_argument('--folder', default=Path(__file__).parent, help='of the detector: this one')
    parser.add_argument('--threshold', type=float, help='difficulty above which images are hard')
    parser.add_argument('--hard-share', type=float, help='share of images that are hard')
    parser.add_argument('--min-score', type=float, default=0.3, help='lowest score to print: 0.3')
    args = parser.parse_args()
    try:
        detector = kind(args.folder)
        found = detector(read_image(args.image), args.threshold, args.hard_share)
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    hard = '' if found.difficulty is None else f', difficulty {found.difficulty:.3f}'
    shown = np.flatnonzero(found.scores >= args.min_score)
    print(f'exit {found.exit}{hard}, {len(shown)} objects')
    for box, score, label in zip(*(part[shown] for part in found[:3])):
        print(detector.about['classes'][label], f'{score:.3f}', *(f'{x:.1f}' for x in box))


if __name__ == '__main__':
    main()
