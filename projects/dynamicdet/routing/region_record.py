"""Regions on a record: what cells really gain, and what a choice of rectangles would find and cost.

A record has the detections of each exit on whole images. A crop is simulated by those of the last
exit that lie inside it; what its edges change is left out, see ``tools/test.py`` for real crops.

Letters: ``n`` images. ``h``, ``w``: rows and columns of an image's grid of cells, see `regions`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pycocotools.coco import COCO

from ..errors import UsageError
from .box_merging import Merge, merge_boxes
from .evaluation import match_objects
from .objective import as_coco, joined_detections
from .record import Detections, RoutingRecord, require_columns
from .region_cells import cells_of, detection_planes, kept_of_crop, kept_of_earlier
from .regions import CELL, Rectangle, grid_of, share_of_area

#: What is found in an image: boxes, (D, 4), left, top, right, bottom; scores and categories, (D,).
ImageDetections = tuple[np.ndarray, np.ndarray, np.ndarray]


def grids_of(record: RoutingRecord, cell: int = CELL) -> list[tuple[int, int]]:
    """Rows and columns of each image's cells, n."""
    require_columns(record, 'frame')
    return [grid_of(int(high), int(wide), cell) for high, wide in record.frame[:, :2]]


def objects_by_class(coco: COCO, categories: Sequence[int]) -> np.ndarray:
    """How many objects of each category, without crowds, a data set has, (C,)."""
    counts = dict.fromkeys(categories, 0)
    for annotation in coco.dataset['annotations']:
        if annotation['category_id'] in counts and not annotation.get('iscrowd'):
            counts[annotation['category_id']] += 1
    return np.array(list(counts.values()))


def planes_of(
    record: RoutingRecord, categories: Sequence[int], weights: np.ndarray, cell: int = CELL
) -> list[np.ndarray]:
    """What the first exit's detections say of each image's cells: see `detection_planes`.

    Args:
        record (RoutingRecord): With ``frame``.
        categories (Sequence[int]): Category id of each class, (C,).
        weights (np.ndarray): Of each class, (C,).
        cell (int): Sides of a cell in pixels. Defaults to `CELL`.
    """
    first, planes = record.detections[0], []
    view = float(record.provenance.get('first_scale', 1.0))
    label_of = {category: label for label, category in enumerate(categories)}
    for row, grid in enumerate(grids_of(record, cell)):
        boxes, scores, category_ids = _detections_of(first, row)
        labels = np.array([label_of[category] for category in category_ids.tolist()], np.int64)
        boxes = boxes * np.tile(record.frame[row, 2:], 2)
        planes.append(detection_planes(boxes, scores, labels, grid, weights, cell, view))
    return planes


def cell_gains(
    record: RoutingRecord,
    coco: COCO,
    categories: Sequence[int],
    weights: np.ndarray,
    cell: int = CELL,
) -> list[np.ndarray]:
    """What each cell really gains by the last exit, n times (h, w): the targets of a router.

    An object counts for the cell of its center. It gains what the last exit finds of it less what
    the first does: the score of the detection that COCO matches with it, averaged over the IoU
    thresholds 0.5 to 0.95, 0 where it is missed, times the weight of its class.

    Args:
        record (RoutingRecord): With ``frame``.
        coco (COCO): Its ground truth.
        categories, weights, cell: As of `planes_of`.
    """
    weight_of = dict(zip(categories, weights))
    matches = [match_objects(record, coco, exit) for exit in (0, record.exits - 1)]
    gains = []
    for row, grid in enumerate(grids_of(record, cell)):
        image_gains = np.zeros(grid[0] * grid[1])
        first, last = (exit[row] for exit in matches)
        ids = sorted(first.keys() | last.keys())
        if ids:
            objects = [coco.anns[annotation_id] for annotation_id in ids]
            boxes = np.array([annotation['bbox'] for annotation in objects], float)
            boxes[:, 2:] += boxes[:, :2]
            cells = cells_of(boxes * np.tile(record.frame[row, 2:], 2), grid, cell)
            values = [
                weight_of[annotation['category_id']] * (last.get(name, 0.0) - first.get(name, 0.0))
                for name, annotation in zip(ids, objects)
            ]
            np.add.at(image_gains, cells, values)
        gains.append(image_gains.reshape(grid))
    return gains


def cell_gains_of_detections(
    exits: Sequence[Sequence[Mapping]],
    truths: Sequence[Mapping],
    shapes: Sequence[tuple[int, int]],
    weights: np.ndarray,
    cell: int = CELL,
) -> list[np.ndarray]:
    """`cell_gains` without a record, of n images.

    Args:
        exits (Sequence): Of the first and the last exit, what it finds in each image, as of
            `objective.image_aps`.
        truths (Sequence[Mapping]): What each image holds, as there.
        shapes (Sequence[tuple]): Height and width of each, in pixels.
        weights, cell: As of `planes_of`.
    """
    count = len(shapes)
    record = RoutingRecord(
        np.arange(count),
        [''] * count,
        np.zeros(count),
        [joined_detections(images) for images in exits],
        [0.0] * 2,
        [0.0] * 2,
        frame=np.array([[*shape[:2], 1.0, 1.0] for shape in shapes]),
    )
    return cell_gains(record, as_coco(truths), list(range(len(weights))), weights, cell)


def simulate_regions(
    record: RoutingRecord,
    rectangles: Sequence[Sequence[Rectangle]],
    merge: Merge | None = None,
    halo: int = 1,
    cell: int = CELL,
) -> Detections:
    """What would be found if the last exit looked at some rectangles of each image alone.

    Args:
        record (RoutingRecord): With ``frame``, of exits that are not merged.
        rectangles (Sequence[Sequence[Rectangle]]): Of each image, n.
        merge (Merge, optional): How detections of both exits are merged. Defaults to None: the
            last exit's take the place of the first's, see `kept_of_earlier`.
        halo, cell (int): As of `choose_rectangles`.
    """
    first, last, images = record.detections[0], record.detections[-1], []
    for row, (chosen, grid) in enumerate(zip(rectangles, grids_of(record, cell))):
        earlier, later = _detections_of(first, row), _detections_of(last, row)
        scale = np.tile(record.frame[row, 2:], 2)
        kept, taken = np.ones(len(earlier[1]), bool), np.zeros(len(later[1]), bool)
        for rectangle in chosen:
            taken |= kept_of_crop(later[0] * scale, rectangle, grid, halo, cell, core=merge is None)
            if merge is None:
                kept &= kept_of_earlier(earlier[0] * scale, rectangle, grid, halo, cell)
        boxes, scores, categories = _joined(_rows(earlier, kept), _rows(later, taken), merge)
        images.append(
            (np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]), scores, categories)
        )
    return Detections.join(images)


def share_of_pixels(
    record: RoutingRecord,
    rectangles: Sequence[Sequence[Rectangle]],
    halo: int = 1,
    cell: int = CELL,
) -> float:
    """Mean share of an image's pixels that rectangles look at again, halos included."""
    grids = grids_of(record, cell)
    return float(np.mean([share_of_area(*pair, halo) for pair in zip(rectangles, grids)]))


def region_gflops(record: RoutingRecord, share: float) -> float:
    """Mean GFLOPs per image where the last exit looks at a share of the pixels: all of the first
    exit, its neck and heads included, and that share of what the last runs besides.

    Raises:
        UsageError: If the record does not say what exit 0's neck and heads cost.
    """
    branch = record.provenance.get('branch0_gflops')
    if branch is None:
        raise UsageError(
            'the record does not say what neck and heads of exit 0 cost: record anew by '
            'tools/record.py'
        )
    first, last = record.gflops[0], record.gflops[-1]
    return first + share * (last - (first - branch))


def _detections_of(detections: Detections, row: int) -> ImageDetections:
    rows = detections.rows(row)
    boxes = detections.boxes[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    return boxes, detections.scores[rows], detections.categories[rows]


def _rows(detections: ImageDetections, kept: np.ndarray) -> ImageDetections:
    return tuple(part[kept] for part in detections)


def _joined(
    earlier: ImageDetections, later: ImageDetections, merge: Merge | None
) -> ImageDetections:
    boxes, scores, categories = (np.concatenate(parts) for parts in zip(earlier, later))
    if merge is None:
        return boxes, scores, categories
    exits = np.repeat([0, 1], [len(earlier[1]), len(later[1])])
    merged = merge_boxes(boxes, scores, categories, exits, merge)
    return merged.boxes, merged.scores, categories[merged.rows]
