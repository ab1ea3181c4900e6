"""COCO's box AP of mixtures of exits: which image leaves where is free, the matching is done once.

pycocotools matches detections with objects image by image, so the matches of a mixture are a
mixture of the matches. What is left for each mixture is a weighted count along the sorted
detections.

Letters: ``n`` images, ``K`` exits, ``D`` detections of all exits, ``T`` IoU thresholds (0.5 to
0.95), ``G`` groups, each with an AP of its own: the categories, or the categories of each image. A
*segment* is a group at one threshold.

AP is in percent. Records are of `record`.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..annotations import read_annotations
from ..errors import UsageError
from .record import RoutingRecord, require_columns

#: As in pycocotools: areas in square pixels, both ends included.
AREAS = dict(all=(0, 1e10), small=(0, 32**2), medium=(32**2, 96**2), large=(96**2, 1e10))
#: As in pycocotools: so many detections of an image and category are looked at, the surest.
_MAX_DETECTIONS = 100
#: Images that pycocotools matches at a time.
_PART = 500
#: As in pycocotools: precision is averaged at these recalls.
_RECALLS = np.linspace(0, 1, 101)


def evaluate(
    coco: COCO, results: Sequence[dict], image_ids: Sequence[int] | None = None
) -> dict[str, float | None]:
    """COCO's box AP by pycocotools, silently.

    Args:
        coco (COCO): Ground truth.
        results (Sequence[dict]): COCO results; may be empty. They stay as they are.
        image_ids (Sequence[int], optional): Images to look at. Defaults to all of ``coco``.

    Returns:
        dict: ``ap``, ``ap50``, ``small``, ``medium``, ``large``, in percent; None where there are
        no objects.
    """
    if not {result['image_id'] for result in results} <= set(coco.imgs):
        raise ValueError('results are of images that the ground truth lacks')
    evaluator = _match(coco, results, coco.getImgIds() if image_ids is None else image_ids, AREAS)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    # (IoU thresholds, recalls, categories, areas); -1 where there are no objects.
    precision = evaluator.eval['precision'][..., -1]
    scores = dict(ap=_mean(precision[..., 0]), ap50=_mean(precision[0, ..., 0]))
    for index, area in enumerate(AREAS):
        if area != 'all':
            scores[area] = _mean(precision[..., index])
    return scores


def read_truth(path: str, categories: Iterable[int] | None = None) -> COCO:
    """Ground truth of a COCO file, silently, mended as `read_annotations` does; without outlines.

    Args:
        path (str): The file.
        categories (Iterable[int], optional): A detector of some of the file's categories is judged
            by no others, as by mmdet's ``CocoMetric``: their ids. Defaults to all.

    Raises:
        UsageError: If it is no annotation file that can be used.
    """
    data = read_annotations(path).data
    known = (
        {category['id'] for category in data['categories']}
        if categories is None
        else set(categories)
    )
    coco = COCO()
    coco.dataset = dict(
        data,
        categories=[category for category in data['categories'] if category['id'] in known],
        annotations=[
            annotation
            for annotation in data['annotations']
            if categories is None or annotation['category_id'] in known
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def mixed_results(record: RoutingRecord, choice: Sequence[int]) -> list[dict]:
    """COCO results of a record's images.

    Args:
        record (RoutingRecord): Any.
        choice (Sequence[int]): The exit of each image, in the record's order; bools count as 0, 1.
    """
    return [
        dict(detection, image_id=identity)
        for row, (identity, exit) in enumerate(zip(record.ids.tolist(), choice))
        for detection in record.detections[int(exit)][row]
    ]


def check_record(record: RoutingRecord, coco: COCO) -> None:
    """Raise a `UsageError` unless a record has images of ``coco``, each once, with difficulties and
    with detections of two exits or more."""
    if not len(record):
        raise UsageError('the record has no images: the validation set is empty')
    if record.exits < 2:
        raise UsageError(
            f'the record has detections of {record.exits} exits: record every image through all '
            'exits, two or more'
        )
    ids = set()
    for row, (identity, difficulty) in enumerate(zip(record.ids.tolist(), record.difficulty)):
        if identity not in coco.imgs:
            raise UsageError(f'{_name_of(record, row)} is not in the annotation file')
        if identity in ids:
            raise UsageError(f'{_name_of(record, row)} is in the record twice')
        # Not `difficulty < 0 or ...`, which lets NaN pass.
        if not 0 <= difficulty <= 1:
            raise UsageError(
                f'{_name_of(record, row)} has difficulty {difficulty}, not in [0, 1]: was the '
                'router trained?'
            )
        ids.add(identity)


def _name_of(record: RoutingRecord, row: int) -> str:
    return f'image {record.ids[row]} ({record.files[row]})'


def check_truth(record: RoutingRecord, coco: COCO) -> None:
    """Raise a `UsageError` where a record seems to be of another data set or split than ``coco``:
    splits may share ids and file names, but not what is in their images."""
    category_ids = {
        category
        for detections in record.detections
        for category in np.unique(detections.categories).tolist()
    }
    if not category_ids <= set(coco.cats):
        raise UsageError(
            f'detections are of category {min(category_ids - set(coco.cats))}, which the '
            'annotation file lacks: is it of another data set?'
        )
    if record.objects is None:
        return
    other = sum(
        count != len(coco.getAnnIds(imgIds=[identity], iscrowd=False))
        for identity, count in zip(record.ids.tolist(), record.objects.tolist())
    )
    if other > len(record) / 2:
        raise UsageError(
            f'{other} of {len(record)} images have another number of objects in the annotation '
            'file than when they were recorded: is it of another split?'
        )


def true_positives(record: RoutingRecord, coco: COCO) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which detections of each exit are right, at IoU 0.5, as COCO's evaluation matches them.

    Returns:
        list[tuple[np.ndarray, np.ndarray]]: Of each exit, K, scores, (D,), and whether they are
        right, (D,), bool, in no particular order; without what COCO ignores: detections of crowds,
        and more than 100 of an image and category.

    Raises:
        UsageError: If the record does not fit ``coco``; see `check_record`.
    """
    check_record(record, coco)
    scored_hits = []
    for exit in range(record.exits):
        parts = []
        for start in range(0, len(record), _PART):
            part = record.take(range(start, min(start + _PART, len(record))))
            results = mixed_results(part, np.full(len(part), exit))
            entries = _match(coco, results, part.ids.tolist(), ['all']).evalImgs
            parts += [
                (entry['dtScores'], entry['dtMatches'][0] > 0, entry['dtIgnore'][0] > 0)
                for entry in entries
                if entry is not None
            ]
        scores, hits, ignored = (
            np.concatenate([np.zeros(0, kind), *column])
            for kind, column in zip((float, bool, bool), zip(*parts))
        )
        scored_hits.append((scores[~ignored], hits[~ignored]))
    return scored_hits


def difficulties_of(record: RoutingRecord) -> np.ndarray:
    """Difficulties in the record's order, (n,), float32 as in the model."""
    return record.difficulty.astype(np.float32)


class Mixtures:
    """AP of any choice of exits, in milliseconds, equal to COCO's.

    Args:
        record (RoutingRecord): Any.
        coco (COCO): Its ground truth.
        view (bool): Whether to take the detections of each image's augmented view. Defaults to
            False.

    Attributes:
        images (int): n.
        exits (int): K.

    Raises:
        UsageError: If the record does not fit ``coco`` (`check_record`), if its images have no
            objects, or if an augmented view is asked for that it lacks.
    """

    def __init__(self, record: RoutingRecord, coco: COCO, view: bool = False) -> None:
        check_record(record, coco)
        if view:
            require_columns(record, 'view')
        self._detections = record.view if view else record.detections
        self.images, self.exits = len(record), record.exits
        self._coco, self._ids = coco, record.ids
        self._matches = {'all': self._match('all')}
        self._counts = {'all': _Counts(self._matches['all'], self.exits)}
        if not self._matches['all'].objects.any():
            raise UsageError('the images of the record have no objects: there is no AP to speak of')

    def ap(self, choice: Sequence[int], weights: Sequence[int] | None = None) -> float:
        """COCO's AP, in percent; NaN if the images that count have no objects.

        Args:
            choice (Sequence[int]): The exit of each image, (n,), in the record's order; bools count
                as 0 and 1.
            weights (Sequence[int], optional): How often each image counts, (n,), as in a bootstrap:
                as if there were so many copies of it, next to each other (where detections of one
                image and category share a score, each is followed by its own copies). Defaults to
                once each.
        """
        return _mean_or_nan(self._precision('all', choice, weights))

    def expected_ap(self, probabilities: np.ndarray, weights: Sequence[int] | None = None) -> float:
        """AP of expected counts, in percent: what AP tends to with many images like these, where
        each leaves at an exit drawn at random. Equal to `ap` where all is certain.

        Args:
            probabilities (np.ndarray): Of each image and exit, (n, K), rows that sum to 1.
            weights (Sequence[int], optional): As in `ap`.
        """
        probabilities = np.asarray(probabilities, float)
        if (
            probabilities.shape != (self.images, self.exits)
            or not (probabilities >= 0).all()
            or not np.allclose(probabilities.sum(axis=1), 1)
        ):
            raise ValueError(
                f'probabilities of {self.images} images and {self.exits} exits are wanted'
            )
        weights = self._checked(weights)
        table = (probabilities * weights[:, None]).ravel()
        return _mean_or_nan(
            self._counts['all'].precision(table, weights @ self._matches['all'].objects)
        )

    def scores(
        self, choice: Sequence[int], weights: Sequence[int] | None = None, sizes: bool = True
    ) -> dict[str, float | None]:
        """``ap``, ``ap50``, ``small``, ``medium`` and ``large``, in percent; None without objects.

        Arguments as of `ap`. The sizes are left out unless ``sizes``: the first call matches anew
        for them, which takes seconds.
        """
        precision = self._precision('all', choice, weights)
        scores = dict(ap=_mean(precision), ap50=_mean(precision[:, 0]))
        for area in AREAS:
            if sizes and area != 'all':
                scores[area] = _mean(self._precision(area, choice, weights))
        return scores

    def image_ap(self, weights: Sequence[float] | None = None) -> np.ndarray:
        """AP of each image by itself under each exit, (K, n), in percent, rounded to 1e-9 so that
        equal results are equal. 0 for images without objects, whatever is found there.

        Args:
            weights (Sequence[float], optional): Of each category's objects, (categories,), by
                sorted id; see `class_weights`. With them an image has the sum over its objects of
                weight times the AP of the object's category in the image: about what it adds to the
                AP of the set, where a category's share of it falls with its number of objects.
                Defaults to the mean over the image's categories.
        """
        objects = self._matches['all'].objects
        if weights is None:
            known = np.maximum((objects > 0).sum(axis=1, keepdims=True), 1)
            shares = (objects > 0) / known
        else:
            shares = objects * np.asarray(weights, float)
        return np.round((self.category_ap() * shares).sum(axis=2), 9)

    def category_ap(self) -> np.ndarray:
        """AP of each category in each image by itself under each exit, (K, n, categories), in
        percent; 0 where the image has none of it. Categories are sorted by id."""
        matches = self._matches['all']
        counts, objects = _Counts(matches.by_image(), self.exits), matches.objects.ravel()
        aps = []
        for exit in range(self.exits):
            table, _ = self._tables(np.full(self.images, exit), None)
            each = np.nan_to_num(counts.precision(table, objects).mean(axis=1))
            aps.append(100 * each.reshape(self.images, -1))
        return np.array(aps)

    @property
    def objects(self) -> np.ndarray:
        """Objects that count of each image and category, (n, categories), sorted by id."""
        return self._matches['all'].objects

    def _precision(
        self, area: str, choice: Sequence[int], weights: Sequence[int] | None
    ) -> np.ndarray:
        """(G, T), in [0, 1], NaN for categories without objects."""
        if area not in self._counts:
            self._matches[area] = self._match(area)
            self._counts[area] = _Counts(self._matches[area], self.exits)
        table, weights = self._tables(choice, weights)
        return self._counts[area].precision(table, weights @ self._matches[area].objects)

    def _tables(self, choice: Sequence[int], weights: Sequence[int] | None) -> tuple:
        """How often each image counts under each exit, (n * K,), and at all, (n,)."""
        choice, weights = np.asarray(choice).astype(np.int64), self._checked(weights)
        if choice.shape != (self.images,) or choice.min() < 0 or choice.max() >= self.exits:
            raise ValueError(f'a choice of {self.images} images among {self.exits} exits is wanted')
        table = np.zeros((self.images, self.exits), np.int64)
        table[np.arange(self.images), choice] = weights
        return table.ravel(), weights

    def _checked(self, weights: Sequence[int] | None) -> np.ndarray:
        if weights is None:
            return np.ones(self.images, np.int64)
        weights = np.asarray(weights)
        if weights.shape != (self.images,) or weights.dtype.kind not in 'iu' or weights.min() < 0:
            raise ValueError(f'weights must be {self.images} whole numbers, none below 0')
        return weights.astype(np.int64)

    def _match(self, area: str) -> '_Matches':
        """Match every exit's detections with the objects of an area range, by pycocotools, a part
        of the images at a time: its dictionaries take 20 times the room of a record's arrays."""
        order = np.argsort(self._ids)
        categories = len(set(self._coco.getCatIds()))
        objects, parts = np.zeros((self.images, categories)), []
        for start in range(0, self.images, _PART):
            rows = order[start : start + _PART]
            for exit, detections in enumerate(self._detections):
                results = [
                    dict(detection, image_id=identity)
                    for row, identity in zip(rows, self._ids[rows].tolist())
                    for detection in detections[row]
                ]
                evaluator = _match(self._coco, results, self._ids[rows].tolist(), [area])
                entries = []
                # Entries are in the order category, image; pycocotools sorts the images by id.
                for index, entry in enumerate(evaluator.evalImgs):
                    if entry is not None:
                        category, rank = divmod(index, len(rows))
                        objects[rows[rank], category] = np.count_nonzero(entry['gtIgnore'] == 0)
                        entries.append((category, start + rank, exit, entry))
                parts.append(_flatten(entries, len(evaluator.params.iouThrs)))
        return _gather(parts, order, objects)


@dataclasses.dataclass
class _Matches:
    """Detections of all exits and what pycocotools made of them.

    ``group``, ``image`` (in the record's order), ``exit``: (D,) ints; ``matched`` (with an object)
    and ``ignored``: (T, D) bools; ``objects``: objects that count, (n, categories), float. Sorted
    by group; within, as pycocotools does: the surest first, equally sure ones by image id.
    """

    group: np.ndarray
    image: np.ndarray
    exit: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray

    def by_image(self) -> '_Matches':
        """The same with a group for each category of each image, n * categories of them."""
        key = self.image * self.objects.shape[1] + self.group
        order = np.argsort(key, kind='stable')
        return _Matches(
            key[order],
            self.image[order],
            self.exit[order],
            self.matched[:, order],
            self.ignored[:, order],
            self.objects,
        )


def _flatten(entries: Iterable[tuple], thresholds: int) -> tuple[np.ndarray, ...]:
    """pycocotools' entries (category, rank of the image id, exit, entry), laid out flat: category,
    rank, exit and score, (D,) each; matched and ignored, (T, D)."""
    entries = [entry for entry in entries if entry[3]['dtScores']]
    sizes = [len(entry['dtScores']) for *_, entry in entries]
    category, rank, exit = [
        np.repeat(np.array([entry[column] for entry in entries], np.int64), sizes)
        for column in range(3)
    ]
    scores = np.array([score for *_, entry in entries for score in entry['dtScores']], float)
    none = [np.zeros((thresholds, 0), bool)]
    matched = np.concatenate(none + [entry['dtMatches'] != 0 for *_, entry in entries], axis=1)
    ignored = np.concatenate(none + [entry['dtIgnore'] != 0 for *_, entry in entries], axis=1)
    return category, rank, exit, scores, matched, ignored


def _gather(
    parts: Sequence[tuple[np.ndarray, ...]], order: np.ndarray, objects: np.ndarray
) -> _Matches:
    """Join what `_flatten` gave of parts of the images, and sort."""
    category, rank, exit, scores, matched, ignored = (
        np.concatenate(columns, axis=-1) for columns in zip(*parts)
    )
    # Stable: an image's detections of one exit stay as pycocotools sorted them.
    place = np.lexsort((rank, -scores, category))
    return _Matches(
        category[place],
        order[rank[place]],
        exit[place],
        matched[:, place],
        ignored[:, place],
        objects,
    )


class _Counts:
    """Matches, laid out so that counting is a few passes over flat arrays.

    At most thresholds a detection either counts, as right or as wrong, or is ignored: that *usual*
        fate
    is summed once for all T. Only *events* are looked at for each threshold: the few detections
    that are right at it, or that differ there from their usual fate. Events are enough, because the
    highest precision at a recall or above is always that of a right detection.
    """

    def __init__(self, matches: _Matches, exits: int) -> None:
        code = (matches.image * exits + matches.exit).astype(np.int32)
        self._thresholds = len(matches.matched)
        usual = ~matches.ignored[-1]
        right = matches.matched & ~matches.ignored
        unusual = ~matches.ignored ^ usual
        # Detections that usually count, sorted by group.
        self._usual = code[usual]
        starts = np.flatnonzero(np.diff(matches.group, prepend=-1))
        before = np.concatenate([[0], np.cumsum(usual)])
        # Events, sorted by segment (group, threshold), then as the detections are.
        threshold, place = np.nonzero(right | unusual)
        segment = matches.group[place] * self._thresholds + threshold
        order = np.argsort(segment, kind='stable')
        threshold, place, self._segment = threshold[order], place[order], segment[order]
        self._event = code[place]
        self._right = right[threshold, place].astype(np.int64)
        self._extra = unusual[threshold, place] * np.where(usual[place], -1, 1)
        # Of the usual ones: how many come before an event's group, and how many up to the event.
        own_start = starts[np.searchsorted(starts, place, side='right') - 1]
        self._from, self._upto = before[own_start], before[place + 1]
        # Where the segment of an event begins among the events.
        self._begin = np.searchsorted(self._segment, self._segment)

    def precision(self, table: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """AP of each group at each threshold, (G, T), in [0, 1]; NaN for groups without objects.

        Args:
            table (np.ndarray): How often each image counts under each exit, (n * K,).
            objects (np.ndarray): Objects of each group, (G,), each as often as its image counts.
        """
        here = table[self._event]
        gained = here * self._right
        picked = np.flatnonzero(gained)
        segment, begin = self._segment[picked], self._begin[picked]
        right = _within(gained, picked, begin)
        usual = _running_sum(table[self._usual])
        counted = usual[self._upto[picked]] - usual[self._from[picked]]
        if self._extra.any():
            counted = counted + _within(here * self._extra, picked, begin)
        # As pycocotools: a hair above 0, for where nothing counts.
        best = _best_from_here(right / (counted + np.spacing(1)), segment)
        # At how many of the recalls an event is the first to reach them.
        reached = np.searchsorted(
            _RECALLS, right / objects[segment // self._thresholds], side='right'
        )
        newly = np.diff(reached, prepend=0)
        first = np.diff(segment, prepend=-1) > 0
        newly[first] = reached[first]
        total = np.bincount(segment, newly * best, minlength=len(objects) * self._thresholds)
        precision = total.reshape(len(objects), self._thresholds) / len(_RECALLS)
        precision[objects == 0] = np.nan
        return precision


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... values."""
    sums = np.zeros(len(values) + 1, values.dtype)
    np.cumsum(values, out=sums[1:])
    return sums


def _within(values: np.ndarray, places: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Sums of the values from each begin up to each place, both ends included."""
    sums = _running_sum(values)
    return sums[places + 1] - sums[begins]


def _best_from_here(values: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """The largest of the values, in [0, 1], from each on to the end of its segment.

    Later segments are put below earlier ones, which costs the last digits: 1e-13 for 1,000
        segments.
    """
    if not len(values):
        return values
    lift = segment[-1] - segment
    return np.maximum.accumulate((values + lift)[::-1])[::-1] - lift


def match_objects(record: RoutingRecord, coco: COCO, exit: int) -> list[dict[int, float]]:
    """What an exit finds of each image's objects: annotation id -> the score of the detection that
    is matched with it, averaged over the IoU thresholds, 0 where there is none. Crowds are left
    out.

    Args:
        record (RoutingRecord): Any.
        coco (COCO): Its ground truth.
        exit (int): 0 to K - 1.

    Returns:
        list[dict[int, float]]: Of each image, in the record's order, those with a match at any
        threshold.
    """
    row_of = {identity: row for row, identity in enumerate(record.ids.tolist())}
    matches: list[dict[int, float]] = [{} for _ in row_of]
    results = mixed_results(record, [exit] * len(record))
    evaluator = _match(coco, results, record.ids.tolist(), ['all'])
    for entry in evaluator.evalImgs:
        if entry is None:
            continue
        score_of = dict(zip(entry['dtIds'], entry['dtScores']))
        kept = [at for at, ignored in enumerate(entry['gtIgnore']) if not ignored]
        for at in kept:
            scores = [
                score_of.get(detection_id, 0.0)
                for detection_id in entry['gtMatches'][:, at].tolist()
            ]
            if any(scores):
                matches[row_of[entry['image_id']]][int(entry['gtIds'][at])] = float(np.mean(scores))
    return matches


def _match(
    coco: COCO, results: Sequence[dict], image_ids: Sequence[int], areas: Iterable[str]
) -> COCOeval:
    """Match detections with objects, image by image, nothing summed up yet."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(coco, _load(coco, results), 'bbox')
        evaluator.params.imgIds = sorted(image_ids)
        evaluator.params.areaRng = [list(AREAS[area]) for area in areas]
        evaluator.params.areaRngLbl = list(areas)
        evaluator.params.maxDets = [_MAX_DETECTIONS]
        evaluator.evaluate()
    return evaluator


def _load(coco: COCO, results: Sequence[dict]) -> COCO:
    """Results as `COCO.loadRes` makes them for boxes; that writes into what it is given, fails on
    an empty list and copies all images of the data set."""
    loaded = COCO()
    loaded.dataset = dict(
        images=[],
        categories=coco.dataset['categories'],
        annotations=[
            dict(result, id=index, area=result['bbox'][2] * result['bbox'][3], iscrowd=0)
            for index, result in enumerate(results, 1)
        ],
    )
    loaded.createIndex()
    return loaded


def _mean(precision: np.ndarray) -> float | None:
    """In percent, of what is known: neither NaN nor pycocotools' -1."""
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None


def _mean_or_nan(precision: np.ndarray) -> float:
    mean = _mean(precision)
    return float('nan') if mean is None else mean
