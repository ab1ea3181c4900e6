"""mmdet's inferencer, at any speed."""

import contextlib
import copy
import itertools
import os
import os.path as osp
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import mmcv
import mmengine
import numpy as np
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.infer.infer import ModelType
from mmengine.registry import FUNCTIONS, Registry
from torch import nn

from mmdet.apis import DetInferencer
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmdet.datasets.transforms import InferencerLoader
from mmdet.structures import DetDataSample

from ..cascade.weights import missing_of, require_complete
from ..configs import full_size as full_size_pipeline
from ..datasets.picture_reading import decode_picture, read_picture, refuse_large
from ..errors import UsageError
from ..models import DynamicDetector, fuse
from ..models.budget_control import (
    BudgetControl,
    budget_report_of,
    build_budget_controller,
    calibrated_otherwise,
    preserved_budget,
    timed_calls,
)
from ..routing.budget import BUDGET_NAMES, Budget
from ..routing.budget_report import BudgetReport
from ..timing import dtype_of, machine_of, timed_elsewhere
from .image_inputs import Picture, pictures_of
from .stream import Stream

if 'mmdet' not in FUNCTIONS.children:
    # mmengine's inferencers look for their collate function in mmdet's scope, which has no registry
    # of functions, and warn. From an empty one they go on to mmengine's.
    Registry('function', parent=FUNCTIONS, scope='mmdet', locations=['mmengine.dataset'])


@dataclass
class _Shown:
    """A picture to draw on: its path, if it has one, and what the pipeline decoded."""

    path: str | None
    decoded: np.ndarray

    @property
    def name(self) -> str | None:
        """Of the drawn picture: of a kind that can be written whatever its size."""
        name = self.path and osp.basename(self.path)
        return name if not name or name.lower().endswith(IMG_EXTENSIONS) else f'{name}.jpg'

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8; red first, of a file."""
        if self.path is None:
            # As mmdet draws on arrays.
            return self.decoded.copy()
        plain = (
            self.decoded.dtype == np.uint8 and self.decoded.ndim == 3 and self.decoded.shape[2] == 3
        )
        # Pipelines may ask for other than mmdet draws on.
        picture = self.decoded if plain else mmcv.imfrombytes(mmengine.fileio.get(self.path))
        return picture[:, :, ::-1]


def _decoder(load: InferencerLoader) -> Callable[[bytes], np.ndarray | None]:
    """How a pipeline decodes the bytes of a file."""
    return partial(
        mmcv.imfrombytes, flag=load.from_file.color_type, backend=load.from_file.imdecode_backend
    )


class DynamicInferencer(DetInferencer):
    """`DetInferencer` whose speed can be chosen, for all calls or for one.

    Results, and the JSON files that it writes, have ``difficulty`` and ``exit`` beside what
    mmdet's have.

    Args:
        model (str or dict, optional): Config, or path of one. Defaults to the checkpoint's.
        weights (str, optional): Path or URL of the checkpoint.
        device (str, optional): Defaults to the best that is there.
        scope (str, optional): Where mmdet's parts are registered. Defaults to 'mmdet'.
        palette (str): Colors of the boxes, as mmdet names them. Defaults to 'none': those of the
            data set.
        show_progress (bool): Whether to show a progress bar. Defaults to True.
        online (bool): Whether a controller holds the budget on the images that come, whatever their
            difficulty and the machine's load: any but ``threshold``. It is ``self.controller``, see
            `routing.budget_controller.BudgetController`, and goes on from call to call. Defaults to
            False.
        full_size (bool): Whether the detector is given pictures as large as they are, not resized:
            for detectors with regions, whose ``first_size`` says how large exit 0 sees them, while
            crops come from the original. Defaults to False.
        budget (Budget or Mapping, optional): The speed of all calls, see `Budget.parse`. Defaults
            to the config's or checkpoint's.
        **named: The same by name, at most one: ``threshold``, ``hard_share``, ``target_latency``
            (mean seconds per image), ``throughput`` (images per second) or ``target_gflops``.

    Attributes:
        budget_report (BudgetReport, optional): What the last call served: pictures at each exit,
            against what was wanted, and their mean cost. Where more than chance parts them, the
            call warns.

    Raises:
        UsageError: If the model is not dynamic, the checkpoint does not fill it, more than one
            budget is given, it is out of range, or it needs a calibrated checkpoint.

    Example:
        >>> detector = DynamicInferencer(
        ...     'configs/dy_faster_rcnn_router.py', 'checkpoint.pth', hard_share=0.5)
        >>> result, = detector('image.jpg')['predictions']
        >>> result['difficulty'], result['exit']
        >>> print(*detector.budget_report.lines(), sep='\\n')
    """

    preprocess_kwargs = {'on_unreadable'}
    #: How the checkpoint was calibrated.
    _calibration: dict = {}

    def __init__(
        self,
        model: ModelType | str | None = None,
        weights: str | None = None,
        device: str | None = None,
        scope: str | None = 'mmdet',
        palette: str = 'none',
        show_progress: bool = True,
        online: bool = False,
        full_size: bool = False,
        budget: Budget | Mapping[str, float] | None = None,
        **named: float,
    ) -> None:
        # Before the model is built, which takes seconds.
        budget = Budget.parse(budget, **named)
        if online and (budget is None or budget.kind == 'threshold'):
            raise UsageError(
                'online needs something to hold: hard_share, target_latency, throughput or '
                'target_gflops'
            )
        # mmdet's builds the pipeline, too.
        self._full_size = full_size
        super().__init__(model, weights, device, scope, palette, show_progress)
        if not hasattr(self.model, 'set_budget'):
            raise UsageError(
                f"this config's model, {type(self.model).__name__}, is not dynamic: use mmdet's "
                'DetInferencer'
            )
        device = next(self.model.parameters()).device
        self.model.timed_elsewhere = timed_elsewhere(
            self._calibration, dict(machine_of(device), dtype=dtype_of(self.model))
        )
        if isinstance(self.model, DynamicDetector) and (
            doubt := calibrated_otherwise(self.model, self._calibration)
        ):
            warnings.warn(doubt)
        self.controller = build_budget_controller(self.model, budget) if online else None
        self._online_budget, self.budget_report = budget, None
        if budget and not online:
            self.model.set_budget(budget)

    def _init_pipeline(self, cfg: Config) -> Compose:
        """As mmdet's, but for pictures as large as they are where that is asked for."""
        if self._full_size:
            if (cfg.model.get('regions') or {}).get('first_size') is None:
                raise UsageError(
                    'full_size is for detectors with regions: give model.regions a first_size, the '
                    'longest side at which exit 0 sees a picture'
                )
            cfg = copy.deepcopy(cfg)
            dataset = cfg.test_dataloader.dataset
            dataset.pipeline = full_size_pipeline(dataset.pipeline)
        return super()._init_pipeline(cfg)

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict | None, cfg: dict) -> None:
        """As mmdet's, but refuse a checkpoint that leaves parts of the model random."""
        if checkpoint is not None:
            state = checkpoint.get('state_dict', checkpoint)
            require_complete(model, state, missing_of(state))
            self._calibration = checkpoint.get('meta', {}).get('calibration', {})
        super()._load_weights_to_model(model, checkpoint, cfg)
        fuse(model)

    def __call__(
        self,
        inputs: Picture | os.PathLike | Iterable[Picture | os.PathLike],
        batch_size: int = 1,
        *args,
        budget: Budget | Mapping[str, float] | None = None,
        **kwargs,
    ) -> dict:
        """As mmdet's, whose arguments are passed on; the speed holds for this call, and a
        controller does not see it.

        Args:
            inputs (str, path, np.ndarray or iterable): A picture, many, or a folder of them. Arrays
                are as cv2.imread gives them: uint8, (H, W, 3), blue, green, red.
            batch_size (int): Pictures at a time. Defaults to 1.
            budget (Budget or Mapping, optional): The speed of this call, also by name, as the
                constructor's.
            on_unreadable (callable, optional): Called with the path of a picture that cannot be
                read and the reason; the others are processed. Without it, the call fails.

        Returns:
            dict: ``predictions``, one per picture, each with ``difficulty`` and ``exit``; and
            ``visualization``, the drawn pictures, if ``return_vis``.
        """
        named = {name: kwargs.pop(name) for name in BUDGET_NAMES if name in kwargs}
        budget = Budget.parse(budget, **named)
        inputs = pictures_of(inputs, skip_missing=kwargs.get('on_unreadable') is not None)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f'batch_size must be a whole number, 1 or more; got {batch_size}')
        with self._speed(budget), self._watched() as calls:
            results = super().__call__(inputs, batch_size, *args, **kwargs)
            self.budget_report = self._report_budget(results['predictions'], budget, calls)
        for doubt in self.budget_report.doubts() if self.budget_report else ():
            warnings.warn(doubt)
        return results

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[tuple[float, int]]]:
        """A list of calls of the model: seconds, and of how many pictures."""
        calls: list[tuple[float, int]] = []
        watch = isinstance(self.model, DynamicDetector)
        with (
            timed_calls(self.model, lambda *call: calls.append(call))
            if watch
            else contextlib.nullcontext()
        ):
            yield calls

    def _report_budget(
        self,
        predictions: list[dict | DetDataSample],
        budget: Budget | None,
        calls: list[tuple[float, int]],
    ) -> BudgetReport | None:
        model, online = self.model, not budget and self.controller is not None
        if not isinstance(model, DynamicDetector):
            return None
        exits = [
            prediction['exit'] if isinstance(prediction, dict) else prediction.exit
            for prediction in predictions
        ]
        # What a first run takes is no cost of an image.
        timed = calls[1:]
        return budget_report_of(
            model,
            [exits.count(exit) for exit in range(model.num_exits)],
            self._online_budget if online else model.budget,
            None if online else model.threshold.reshape(-1).tolist(),
            sum(seconds for seconds, _ in timed) / sum(images for _, images in timed)
            if timed
            else None,
        )

    @contextlib.contextmanager
    def _speed(self, budget: Budget | None) -> Iterator[None]:
        """A speed for a while: the one that is given, or else the controller's."""
        with contextlib.ExitStack() as stack:
            if budget:
                stack.enter_context(preserved_budget(self.model))
                self.model.set_budget(budget)
            elif self.controller is not None:
                stack.enter_context(BudgetControl(self.model, self.controller))
            yield

    def stream(
        self,
        images: Iterable[str | os.PathLike | np.ndarray | None],
        batch_size: int = 8,
        hard_batch: int | None = None,
        collect_easy: bool = False,
        deadline: float | None = None,
        on_unreadable: Callable[[str, str], None] | None = None,
    ) -> Iterator[dict]:
        """Detect in images as they come: hard images of several batches run together.

        Args:
            images (Iterable): Paths, URLs or arrays; None where there is nothing yet. It may pause
                and need not end. With a deadline it is read in a thread of its own.
            batch_size (int): Images of the first pass. Defaults to 8.
            hard_batch (int, optional): Images of the later passes. Defaults to ``batch_size``.
            collect_easy (bool): Whether easy images wait for a full batch, too. Defaults to False.
            deadline (float, optional): Seconds after which an image waits for no other. Defaults to
                None.
            on_unreadable (callable, optional): Called with the path of a picture that cannot be
                read and the reason; it has no result, and the stream goes on. Without it, the
                stream ends there with an error, once all before it have their results.

        Yields:
            dict: Each image's result, in the order of the images, as in ``predictions``: labels,
                scores, bboxes, ``difficulty`` and ``exit``.
        """
        images = (
            image if image is None else pictures_of([image], on_unreadable is not None)[0]
            for image in images
        )
        batches = self._batches_of_one(images, on_unreadable)
        with Stream(
            self.model, batch_size, hard_batch, collect_easy, deadline, controller=self.controller
        ) as stream:
            for sample in stream.run(batches):
                yield self.pred2dict(sample)

    def _batches_of_one(
        self, images: Iterable, on_unreadable: Callable | None
    ) -> Iterator[dict | None]:
        for image in images:
            if image is None:
                yield None
            else:
                yield from (
                    data for _, data in self.preprocess([image], on_unreadable=on_unreadable)
                )

    def preprocess(
        self,
        inputs: Iterable[str | np.ndarray | dict],
        batch_size: int = 1,
        on_unreadable: Callable[[str, str], None] | None = None,
        **kwargs,
    ) -> Iterator:
        """As mmdet's, but each picture is decoded once, for the detector and for drawing; see
        `__call__` for ``on_unreadable``."""
        load, *rest = self.pipeline.transforms
        loaded = self._loaded(inputs, load, on_unreadable)
        while batch := list(itertools.islice(loaded, batch_size)):
            yield self.collate_fn([(shown, Compose(rest)(results)) for shown, results in batch])

    def prepare(
        self, data: bytes, most_pixels: int, formats: tuple[str, ...] | None = None
    ) -> tuple[dict | None, str | None]:
        """The bytes of a picture file as the detector takes them. May be called in several threads.

        Args:
            data (bytes): Of a file that nobody vouches for.
            most_pixels (int): Width times height of the largest picture that is decoded.
            formats (tuple[str], optional): See `picture_reading.refuse_large`.

        Returns:
            tuple: ``inputs``, (3, H, W), and its ``data_samples``, one, and None; or None, and why
                not.
        """
        load, *rest = self.pipeline.transforms
        fault = refuse_large(data, most_pixels, formats)
        if fault is None:
            picture, fault = decode_picture(data, _decoder(load))
        if fault is not None:
            return None, fault
        return Compose(rest)(load(dict(img=picture))), None

    @staticmethod
    def _loaded(
        inputs: Iterable[str | np.ndarray | dict],
        load: InferencerLoader,
        on_unreadable: Callable[[str, str], None] | None,
    ) -> Iterator[tuple['_Shown', dict]]:
        """Of each picture what is drawn on, and what the pipeline's first step makes of it."""

        decode = _decoder(load)
        for item in inputs:
            if on_unreadable is not None and isinstance(item, str):
                picture, fault = read_picture(item, decode)
                if fault is not None:
                    on_unreadable(item, fault)
                    continue
                results = dict(load(dict(img=picture)), img_path=item)
            else:
                results = load(dict(item) if isinstance(item, dict) else item)
            yield _Shown(results.get('img_path'), results['img']), results

    def visualize(
        self,
        inputs: list['_Shown'],
        preds: list[DetDataSample],
        return_vis: bool = False,
        show: bool = False,
        wait_time: int = 0,
        draw_pred: bool = True,
        pred_score_thr: float = 0.3,
        no_save_vis: bool = False,
        img_out_dir: str = '',
    ) -> list[np.ndarray] | None:
        """As mmdet's, which decodes every picture once more, and keeps every drawn one of a folder
        in memory, asked for or not."""
        out_dir = '' if no_save_vis else img_out_dir
        if not (show or out_dir or return_vis):
            return None
        drawn = []
        for shown, pred in zip(inputs, preds):
            name = shown.name or f'{self.num_visualized_imgs:08}.jpg'
            self.visualizer.add_datasample(
                name,
                shown.pixels(),
                pred,
                show=show,
                wait_time=wait_time,
                draw_gt=False,
                draw_pred=draw_pred,
                pred_score_thr=pred_score_thr,
                out_file=osp.join(out_dir, 'vis', name) if out_dir else None,
            )
            drawn += [self.visualizer.get_image()] if return_vis else []
            self.num_visualized_imgs += 1
        return drawn if return_vis else None

    def pred2dict(self, data_sample: DetDataSample, pred_out_dir: str = '') -> dict:
        """As mmdet's, with ``difficulty`` and ``exit``, and ``regions`` where there are any."""
        if data_sample.get('img_path') is None:
            # An array. mmdet then counts, unless there is a path, even if it is None.
            data_sample.pop('img_path', None)
            name = str(self.num_predicted_imgs)
        else:
            name = osp.splitext(osp.basename(data_sample.img_path))[0]
        result = super().pred2dict(data_sample, pred_out_dir)
        result.update(difficulty=data_sample.difficulty, exit=data_sample.exit)
        if 'regions' in data_sample:
            result.update(regions=data_sample.regions)
        if pred_out_dir:
            # Over mmdet's file, which lacks the two.
            mmengine.dump(result, osp.join(pred_out_dir, 'preds', f'{name}.json'))
        return result
