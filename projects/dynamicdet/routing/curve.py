"""What a hard share buys: AP and cost of the router's choice, against a choice at random.

All functions work on a *record* of one pass in which every image went through both exits, a plain
dictionary:

* ``images``: per image a dictionary of ``id``, ``file``, ``difficulty`` in [0, 1] and
  ``detections``: those of exit 0 and of exit 1, each a list of COCO results without ``image_id``.
* ``gflops``: mean per image of exit 0 and of exit 1, 2 x multiply-adds.
* ``latencies``: of exit 0 and of exit 1, seconds per image.
* ``provenance``: any dictionary.

So the model runs once, and each share costs no more than an evaluation. AP is COCO's, in percent.
"""
import contextlib
import copy
import io
from typing import Callable, Dict, List, Mapping, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import UsageError
from .thresholds import threshold_for_share

SHARES = tuple(tenth / 10 for tenth in range(11))
#: As in pycocotools: areas in square pixels, both ends included.
AREAS = dict(all=(0, 1e10), small=(0, 32**2), medium=(32**2, 96**2), large=(96**2, 1e10))

#: APs closer than this, in percent, are equal: only rounding parts them.
_SAME_AP = 1e-9


def evaluate(coco: COCO,
             results: Sequence[dict],
             image_ids: Optional[Sequence[int]] = None) -> Dict[str, Optional[float]]:
    """COCO's box AP, silently.

    Args:
        coco (COCO): Ground truth.
        results (Sequence[dict]): COCO results; may be empty. They stay as they are.
        image_ids (Sequence[int], optional): Images to look at. Defaults to all of ``coco``.

    Returns:
        dict: ``ap``, ``ap50``, ``small``, ``medium``, ``large``, in percent; None where there are
        no objects.
    """
    return _score(_match(coco, results, coco.getImgIds() if image_ids is None else image_ids))


def mix(record: Mapping, hard: Sequence[bool]) -> List[dict]:
    """COCO results of a record's images, hard ones from exit 1, others from exit 0.

    Args:
        record (Mapping): See the top of this file.
        hard (Sequence[bool]): One per image, in the record's order.
    """
    return [dict(detection, image_id=image['id'])
            for image, is_hard in zip(record['images'], hard)
            for detection in image['detections'][int(is_hard)]]


def check_record(record: Mapping, coco: COCO) -> None:
    """Raise a `UsageError` unless a record has images of ``coco``, each once, with difficulties."""
    if not record['images']:
        raise UsageError('the record has no images: the validation set is empty')
    seen = set()
    for image in record['images']:
        if image['id'] not in coco.imgs:
            raise UsageError(f"image {image['id']} ({image['file']}) is not in the annotation file")
        if image['id'] in seen:
            raise UsageError(f"image {image['id']} ({image['file']}) is in the record twice")
        # Not `difficulty < 0 or ...`, which lets NaN pass.
        if not 0 <= image['difficulty'] <= 1:
            raise UsageError(f"image {image['id']} ({image['file']}) has difficulty "
                             f"{image['difficulty']}, not in [0, 1]: was the router trained?")
        seen.add(image['id'])


def difficulties_of(record: Mapping) -> np.ndarray:
    """Difficulties in the record's order, (n,), float32 as in the model."""
    return np.array([image['difficulty'] for image in record['images']], np.float32)


def trade_off(record: Mapping,
              coco: COCO,
              shares: Sequence[float] = SHARES,
              random_draws: int = 5,
              seed: int = 0,
              progress: Optional[Callable[[int, int], None]] = None) -> List[dict]:
    """AP and cost at several hard shares.

    Args:
        record (Mapping): See the top of this file.
        coco (COCO): Its ground truth.
        shares (Sequence[float]): Wanted hard shares, in [0, 1]. Defaults to 0, 0.1, ... 1.
        random_draws (int): Draws of random routing per share, at least 2. Defaults to 5.
        seed (int): Seed of the draws. Defaults to 0.
        progress (Callable, optional): Called with (rows done, rows in all) after each.

    Returns:
        list[dict]: Per share ``share`` as asked, ``threshold``, ``hard_share`` that it gives,
        ``ap`` and ``ap50`` in percent, ``gflops`` per image, ``latency`` in seconds per image, and
        ``random_ap`` and ``random_std``: mean and standard deviation of the AP where just as many
        images, drawn at random, are hard.

    Raises:
        UsageError: If the record is empty, has difficulties that are not finite or images that
            ``coco`` lacks, or if the images have no objects.
    """
    check_record(record, coco)
    if random_draws < 2:
        raise UsageError(f'a standard deviation needs 2 random draws or more, got {random_draws}')
    score, generator = _mixture(record, coco), np.random.default_rng(seed)
    rows = []
    for share in shares:
        rows.append(_row(record, share, score, random_draws, generator))
        if progress:
            progress(len(rows), len(shares))
    return rows


def gain_over_random(rows: Sequence[Mapping]) -> Dict[str, Optional[float]]:
    """How much a router is worth.

    Args:
        rows (Sequence[Mapping]): As `trade_off` gives them.

    Returns:
        dict: ``mean``: AP minus random routing's, in percent, averaged over the rows between the
        ends (None without any). ``half``: by how much the AP at half hard is above the straight
        line between the ends, as a share of the difference of the ends (None if a row of 0, 0.5 or
        1 is missing, or the ends do not differ).
    """
    inner = [row['ap'] - row['random_ap'] for row in rows if 0 < row['hard_share'] < 1]
    by_asked = {row['share']: row for row in rows}
    half = None
    if {0, 0.5, 1} <= by_asked.keys():
        first, last, middle = by_asked[0]['ap'], by_asked[1]['ap'], by_asked[0.5]
        # Where images share a score, the share is not quite a half.
        chord = first + middle['hard_share'] * (last - first)
        if abs(last - first) > _SAME_AP:
            half = (middle['ap'] - chord) / (last - first)
    return dict(mean=float(np.mean(inner)) if inner else None, half=half)


def _row(record: Mapping, share: float, score: Callable, draws: int,
         generator: np.random.Generator) -> dict:
    difficulties = difficulties_of(record)
    threshold = threshold_for_share(difficulties, share)
    hard = difficulties > np.float32(threshold)
    got = float(hard.mean())
    own = score(hard)
    # All or none: there is one way to draw them.
    at_random = [own['ap']]
    if 0 < got < 1:
        at_random = [score(generator.permutation(hard))['ap'] for _ in range(draws)]
    (gflops0, gflops1), (latency0, latency1) = record['gflops'], record['latencies']
    return dict(
        share=share,
        threshold=threshold,
        hard_share=got,
        ap=own['ap'],
        ap50=own['ap50'],
        gflops=(1 - got) * gflops0 + got * gflops1,
        latency=(1 - got) * latency0 + got * latency1,
        random_ap=float(np.mean(at_random)),
        random_std=float(np.std(at_random, ddof=1)) if len(at_random) > 1 else 0.0)


def _mixture(record: Mapping, coco: COCO) -> Callable[[np.ndarray], Dict[str, float]]:
    """A function from a boolean per image, in the record's order, to ``ap`` and ``ap50``.

    It gives what ``evaluate(coco, mix(record, hard))`` gives, but matches each exit's detections
    with the ground truth once, not once per call: pycocotools does this image by image, so the
    matches of a mixture are a mixture of the matches.
    """
    ids = [image['id'] for image in record['images']]
    exits = [_match(coco, mix(record, [exit] * len(ids)), ids, areas=('all', )) for exit in (0, 1)]
    # Entries are in the order category, image; pycocotools sorts the images by id.
    matches = [_objects(evaluator.evalImgs).reshape(-1, len(ids)) for evaluator in exits]
    order = np.argsort(ids)

    def score(hard: np.ndarray) -> Dict[str, float]:
        evaluator = copy.copy(exits[0])
        evaluator.evalImgs = np.where(hard[order], matches[1], matches[0]).ravel().tolist()
        return _score(evaluator)

    if score(np.zeros(len(ids), bool))['ap'] is None:
        raise UsageError('the images of the record have no objects: there is no AP to speak of')
    return score


def _objects(items: list) -> np.ndarray:
    """An array of the items themselves, whatever they are."""
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _match(coco: COCO, results: Sequence[dict], image_ids: Sequence[int],
           areas: Sequence[str] = tuple(AREAS)) -> COCOeval:
    """Match detections with ground truth, image by image, nothing summed up yet."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, _load(coco, results), 'bbox')
        evaluator.params.imgIds = sorted(image_ids)
        evaluator.params.areaRng = [list(AREAS[area]) for area in areas]
        evaluator.params.areaRngLbl = list(areas)
        evaluator.params.maxDets = [100]
        evaluator.evaluate()
    return evaluator


def _load(coco: COCO, results: Sequence[dict]) -> COCO:
    # `loadRes` writes into what it is given, and fails on an empty list.
    if results:
        return coco.loadRes([dict(result) for result in results])
    nothing = COCO()
    nothing.dataset = dict(coco.dataset, annotations=[])
    nothing.createIndex()
    return nothing


def _score(evaluator: COCOeval) -> Dict[str, Optional[float]]:
    """Sum up: ``ap``, ``ap50`` and the AP of each area but 'all', in percent, or None."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    # (IoU thresholds 0.5 to 0.95, recalls, categories, areas); -1 where there are no objects.
    precision = evaluator.eval['precision'][..., -1]
    scores = dict(ap=_mean(precision[..., 0]), ap50=_mean(precision[0, ..., 0]))
    for index, area in enumerate(evaluator.params.areaRngLbl[1:], 1):
        scores[area] = _mean(precision[..., index])
    return scores


def _mean(precision: np.ndarray) -> Optional[float]:
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None
