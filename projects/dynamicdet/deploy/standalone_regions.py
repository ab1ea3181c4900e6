"""Detect objects in images, and once more in regions of them: ``python runtime.py IMAGE.jpg``, or
``Detector(folder)(image)``. Needs numpy and onnxruntime alone. Copied by DynamicDet's
tools/export.py as runtime.py, beside ``whole_runtime.py``, of which it is an extension, and
``numerics``, which chooses regions and joins what is found there."""

from collections import namedtuple

import numpy as np

if __package__:
    from ..routing import box_merging, region_cells, regions
    from . import standalone_runtime as whole
else:
    import whole_runtime as whole
    from numerics.routing import box_merging, region_cells, regions

FORMAT, VERSION, ABOUT = 'dynamicdet.standalone.regions', whole.VERSION, whole.ABOUT
#: As `whole_runtime.Detections`; then what was looked at again, a list of left, top, right, bottom
#: in pixels.
Detections = namedtuple('Detections', (*whole.Detections._fields, 'regions'))
#: What a half says: boxes, scores, labels, and its maps by name.
_Found = namedtuple('_Found', 'boxes scores labels maps')


class Detector(whole.Detector):
    """A folder's detector. A budget is a price: the threshold, 1 for exit 0 alone and 0 or less for
    all of exit 1; or the hard share, here the share of pixels that is looked at again."""

    FORMAT = FORMAT

    def __init__(self, folder, threads=0, providers=('CPUExecutionProvider',)):
        super().__init__(folder, threads, providers)
        self.settings = settings = self.about['regions']
        self.merge = box_merging.Merge.parse(settings['merge'])
        self._class_weights = np.array(settings['class_weights'], np.float32)
        self._choice = [settings[name] for name in ('halo', 'limit', 'overhead', 'step')]

    def threshold_for(self, threshold=None, hard_share=None):
        """The price of a budget, as a number in [-1, 1]; ValueError if it is none."""
        if hard_share is None or threshold is not None:
            return super().threshold_for(threshold, hard_share)
        if not self.settings['curve']:
            raise ValueError('a hard share needs a calibrated model')
        curve = regions.PriceCurve(*np.array(self.settings['curve']).T[:3])
        return regions.threshold_for_area(curve, hard_share)

    def run(self, delivered, scale, original, threshold):
        """Detections in an image, (3, h, w), that was resized by factors of width and height from
        an original height and width, and padded, as `deliver` does; the threshold comes last."""
        settings, (halo, limit, overhead, step) = self.settings, self._choice
        first = self._half(0, delivered, scale, original)
        wide, high = scale
        factors = np.array([wide, high, wide, high])
        grid = regions.grid_of(*delivered.shape[1:], settings['cell'])
        gains = self._gains(first, factors, grid, delivered)
        highest = regions.highest_price(gains, halo, overhead, step, limit)
        difficulty = regions.threshold_of_price(highest)
        price = regions.price_of_threshold(float(np.float32(threshold)))
        chosen = regions.choose_rectangles(gains, price, halo, limit, overhead, step)
        if not chosen:
            return Detections(*first[:3], None, difficulty, 0, [])
        divisor = settings['divisor']
        canvas = [-(-side // divisor) * divisor for side in delivered.shape[1:]]
        boxes = [self._box(one, grid, canvas) for one in chosen]
        seen = [np.minimum([a, b, c, d], delivered.shape[1:] * 2) for a, b, c, d in boxes]
        seen = [(box[[1, 0, 3, 2]] / factors).tolist() for box in seen]
        if price <= 0 and max(canvas) <= settings['tile']:
            second = self._half(1, delivered, scale, original, first.maps)
            found = second if self.merge is None else self._joined([first, second])
            return Detections(*found[:3], None, difficulty, 1, seen)
        keep, parts, core = np.ones(len(first.scores), bool), [], self.merge is None
        most = settings['tile'] // settings['cell'] // step * step - 2 * halo
        for rectangle in [tile for one in chosen for tile in regions.tiles_of(one, most)]:
            box = self._box(rectangle, grid, canvas)
            where = rectangle, grid, halo, settings['cell']
            found = self._crop(delivered, box, canvas, scale, first.maps)
            inside = region_cells.kept_of_crop(found.boxes * factors, *where, core=core, step=step)
            parts.append(_Found(*(part[inside] for part in found[:3]), None))
            if core:
                keep &= region_cells.kept_of_earlier(first.boxes * factors, *where, step)
        found = self._joined([_Found(*(part[keep] for part in first[:3]), None), *parts])
        return Detections(*found[:3], None, difficulty, 1, seen)

    def _box(self, rectangle, grid, canvas):
        """A rectangle with its halo, in pixels: top, left, bottom, right."""
        halo, _, _, step = self._choice
        box = regions.with_halo(rectangle, grid, halo, step)
        return [min(line * self.settings['cell'], end) for line, end in zip(box, canvas * 2)]

    def _half(self, half, image, scale, original, maps=()):
        values = dict(image=image[None], scale=np.float32(scale), original=np.float32(original))
        values.update(maps)
        session = self.sessions[half]
        feed = {entry.name: values[entry.name] for entry in session.get_inputs()}
        given = dict(zip([one.name for one in session.get_outputs()], session.run(None, feed)))
        maps = {name: array for name, array in given.items() if name.startswith('map')}
        return _Found(given['boxes'], given['scores'], given['labels'], maps)

    def _gains(self, first, factors, grid, delivered):
        settings = self.settings
        planes = region_cells.detection_planes(
            first.boxes * factors,
            first.scores,
            first.labels,
            grid,
            self._class_weights,
            settings['cell'],
            self._view(delivered),
        )
        if settings['router'] is None:
            return region_cells.rule_map(planes)
        weight = np.float32(settings['router']['weight'])
        return np.tensordot(weight, planes, 1) + np.float32(settings['router']['bias'])

    def _view(self, delivered):
        """How large exit 0 sees an image: the lesser of the shares of both sides."""
        settings, stride = self.settings, self.settings['stride']
        sides = np.array(delivered.shape[1:])
        old = -(-sides // settings['divisor']) * settings['divisor']
        scale = min(settings['scale'], (settings['first_size'] or np.inf) / max(old))
        if scale == 1:
            return 1.0
        return float((np.maximum(1, np.round(old * scale / stride)) * stride / old).min())

    def _crop(self, delivered, box, canvas, scale, maps):
        """What the second half finds in a crop, in the frame of its image."""
        top, left, bottom, right = box
        (wide, high), image = scale, delivered[:, top:bottom, left:right]
        original = [max(1, round(side / by)) for side, by in zip(image.shape[1:], (high, wide))]
        parts = {name: _part(values, box, canvas) for name, values in maps.items()}
        found = self._half(1, np.ascontiguousarray(image), scale, original, parts)
        moved = np.float32([left / wide, top / high] * 2)
        return found._replace(boxes=found.boxes + moved)

    def _joined(self, exits):
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(*(e[:3] for e in exits)))
        if self.merge is None:
            order = np.argsort(-scores, kind='stable')
            return boxes[order], scores[order], labels[order]
        numbers = np.repeat(np.arange(len(exits)), [len(found.scores) for found in exits])
        merged = box_merging.merge_boxes(boxes, scores, labels, numbers, self.merge)
        return merged.boxes, merged.scores, labels[merged.rows]


def _part(values, box, canvas):
    """The cells of a map, (1, C, H, W), that a box of its image covers, if in part."""
    sides = values.shape[2:]
    top, left = (at * side // whole_ for at, side, whole_ in zip(box[:2], sides, canvas))
    bottom, right = (-(-at * side // whole_) for at, side, whole_ in zip(box[2:], sides, canvas))
    return np.ascontiguousarray(values[:, :, top:bottom, left:right])


if __name__ == '__main__':
    whole.main(Detector)
