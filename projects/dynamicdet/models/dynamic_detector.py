"""A stock MMDetection detector, twice, with a choice in between.

Letters, as in the paper (DynamicDet, arXiv 2304.05552):

* N: images in a batch. x: images, (N, 3, H, W), normalised.
* ``f1``, ``f2``: maps of the first and second backbone, tuples of (N, C_i, H_i, W_i), one per stage.
* ``phi``: difficulty, (N,), in [0, 1], large is hard.
* Exit 0 is the first backbone with its branch (neck and heads), exit 1 the second with its own.
"""
import copy
from typing import Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.model import ModuleList
from torch import Tensor

from mmdet.models.detectors import BaseDetector
from mmdet.models.utils import rename_loss_dict
from mmdet.registry import MODELS
from mmdet.structures import OptSampleList, SampleList

from ..checkpoints import is_plain
from ..errors import UsageError
from ..routing import WEIGHTINGS, resolve_threshold, router_loss, weigh
from ..routing.thresholds import check_budget
from .branch import build_branch
from .composite import build_composite
from .paired_losses import View, paired_losses
from .resolution import Ratio, reduce_images, reduce_samples, scale_boxes


@MODELS.register_module()
class DynamicDetector(BaseDetector):
    """Make any mmdet detector dynamic.

    Trained in two steps: first the cascade (both exits, ``train_router=False``), then the router
    alone (``train_router=True``). Used at any speed: see ``budget``.

    Args:
        detector (dict): Config of the stock detector.
        backbone (dict, optional): Config of each of the two backbones. Defaults to the
            detector's; where both are given, this one counts. The shipped configs name it, since
            mmdet's ``init_detector`` looks for ``model.backbone``.
        shared (bool): Whether both exits use one neck and one set of heads, as two-stage
            detectors do; YOLO variants have two. Defaults to True.
        reuse_stages (int): Leading stages that the second backbone takes over from the first;
            see `CompositeBackbone`. Defaults to 1.
        first_scale (float): How large exit 0 sees the image, as a share of its delivered sides, in
            (0, 1]; exit 1 sees it as delivered. Below 1 it takes ``reuse_stages=0``. Defaults to 1.
        router (dict): Config of the router; ``in_channels`` is filled in. Defaults to the paper's.
        train_router (bool): Whether this is step 2. Then nothing but the router can change.
            Defaults to False.
        weighting (str): How an image's loss counts in step 2, a key of `routing.WEIGHTINGS`.
            Defaults to 'mean', the paper's.
        budget (dict, optional): The wanted speed: one of ``threshold`` in [-1, 1], ``hard_share`` in
            [0, 1], ``target_latency`` in seconds; the last two need a calibrated checkpoint.
            Defaults to the checkpoint's threshold.
        data_preprocessor (dict, optional): Defaults to the detector's.
        init_cfg (dict, optional): As in mmengine. A checkpoint of the plain detector fills both
            exits. Defaults to the detector's.
    """

    def __init__(self,
                 detector: dict,
                 backbone: Optional[dict] = None,
                 shared: bool = True,
                 reuse_stages: int = 1,
                 first_scale: float = 1.0,
                 router: dict = dict(type='Router'),
                 train_router: bool = False,
                 weighting: str = 'mean',
                 budget: Optional[dict] = None,
                 data_preprocessor: Optional[dict] = None,
                 init_cfg: Optional[dict] = None) -> None:
        if weighting not in WEIGHTINGS:
            raise UsageError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got '{weighting}'")
        if not 0 < first_scale <= 1 or first_scale < 1 and reuse_stages:
            raise UsageError(f'first_scale must be in (0, 1], and below 1 with reuse_stages=0, since the '
                             f'second backbone then needs its own stem; got {first_scale} with '
                             f'reuse_stages={reuse_stages}')
        if budget:
            check_budget(budget)
        preprocessor = data_preprocessor or detector.get('data_preprocessor')
        super().__init__(
            data_preprocessor=MODELS.build(copy.deepcopy(preprocessor)) if preprocessor else None,
            init_cfg=init_cfg or copy.deepcopy(detector.get('init_cfg')))
        self.backbone = build_composite(backbone or detector['backbone'], reuse_stages)
        self.branches = ModuleList(build_branch(detector) for _ in range(1 if shared else 2))
        self.router = MODELS.build(dict(in_channels=self.backbone.channels, **router))
        self.first_scale = first_scale
        #: Of the deepest map: all but a few detectors have 32; those with more pad to it.
        self.stride = max(32, getattr(self.data_preprocessor, 'pad_size_divisor', 1))
        self.weighting = weighting
        self.budget = dict(budget) if budget else None
        self.train_router = train_router
        self.register_buffer('threshold', torch.tensor(0.5))
        # NaN: not measured yet.
        self.register_buffer('delta', torch.tensor(float('nan')))
        # The calibration: sorted difficulties of the validation set, (n,), and the latencies of
        # both exits, seconds. Empty until tools/calibrate.py fills them.
        self.register_buffer('difficulties', torch.zeros(0))
        self.register_buffer('latencies', torch.full((2, ), float('nan')))
        self._apply_budget()
        # Each step trains its own part. Here and not in a hook: the optimiser and DDP look at
        # `requires_grad` before any hook runs.
        for name, parameter in self.named_parameters():
            parameter.requires_grad &= name.startswith('router.') == train_router

    def train(self, mode: bool = True) -> 'DynamicDetector':
        """In step 2 all but the router stays in eval mode, whatever a loop asks for."""
        super().train(mode)
        if self.train_router:
            for name, module in self.named_children():
                if name not in ('router', 'data_preprocessor'):
                    module.eval()
        return self

    # Loading.

    def spread_plain_weights(self, state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
        """Rename the entries of a plain detector's checkpoint to those of both exits.

        A dynamic detector's own checkpoint comes back as it is. Entries that match nothing keep
        their name, so that whoever loads names them.
        """
        if not is_plain(state_dict):
            return dict(state_dict)
        known, spread = set(self.state_dict()), {}
        for key, value in state_dict.items():
            if key.startswith('backbone.'):
                rest = key[len('backbone.'):]
                targets = [f'backbone.first.{rest}', f'backbone.second.{rest}']
            else:
                targets = [f'branches.{index}.{key}' for index in range(len(self.branches))]
            spread.update({name: value for name in targets if name in known} or {key: value})
        return spread

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args) -> None:
        """Take checkpoints of plain detectors, for both exits, and calibrations of any length."""
        own = {key[len(prefix):]: state_dict.pop(key)
               for key in list(state_dict) if key.startswith(prefix)}
        own = self.spread_plain_weights(own)
        state_dict.update({prefix + key: value for key, value in own.items()})
        if 'difficulties' in own:
            self.difficulties = self.difficulties.new_empty(own['difficulties'].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply_budget()

    # Speed.

    def set_budget(self,
                   threshold: Optional[float] = None,
                   hard_share: Optional[float] = None,
                   target_latency: Optional[float] = None) -> float:
        """Choose the speed; give one of the three.

        Args:
            threshold (float, optional): In [-1, 1]. Hard when the difficulty is above it.
            hard_share (float, optional): Share of the calibration's images that are hard.
            target_latency (float, optional): Mean seconds per image, on the calibration's device.

        Returns:
            float: The threshold.

        Raises:
            UsageError: If out of range, or if the model is not calibrated and needs to be.
        """
        given = dict(threshold=threshold, hard_share=hard_share, target_latency=target_latency)
        budget = {name: value for name, value in given.items() if value is not None}
        value = resolve_threshold(budget, self.difficulties.tolist(), self.latencies.tolist())
        self.threshold.fill_(value)
        self.budget, self._budget_waits = budget, False
        return value

    def _apply_budget(self) -> None:
        """Set the threshold as soon as what the config's budget needs is loaded."""
        if self.budget and ('threshold' in self.budget or len(self.difficulties)):
            self.set_budget(**self.budget)
        else:
            self._budget_waits = bool(self.budget)

    # Forward.

    def score(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> Tensor:
        """Difficulty of each image, (N,), by the first backbone and the router alone."""
        maps, _ = self._first_maps(batch_inputs)
        return self.router(maps, _valid(batch_inputs, batch_data_samples))

    def branch(self, exit: int) -> BaseDetector:
        """Neck and heads of an exit, 0 or 1."""
        return self.branches[min(exit, len(self.branches) - 1)]

    def extract_feat(self, batch_inputs: Tensor) -> Tuple[Tensor, ...]:
        """``f1``, as the first branch's neck leaves it."""
        maps, _ = self._first_maps(batch_inputs)
        return self.branch(0).extract_feat(self.backbone.select(maps))

    def _first_maps(self, batch_inputs: Tensor) -> Tuple[tuple, Ratio]:
        """``f1``, and how large the images were that it was made from."""
        images, ratio = reduce_images(batch_inputs, self.first_scale, self.stride)
        return self.backbone.first_maps(images), ratio

    def _both_exits(self, batch_inputs: Tensor, samples: OptSampleList) -> List[tuple]:
        """Maps, data samples and ratio of exit 0, and of exit 1: each as the exit sees the batch."""
        first, ratio = self._first_maps(batch_inputs)
        second = self.backbone.second_maps(batch_inputs, first)
        return [(first, reduce_samples(samples, ratio), ratio), (second, samples, (1.0, 1.0))]

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> Dict[str, Tensor]:
        """Losses of the step that is trained.

        Step 1: both exits' own losses, named ``exit0.*`` and ``exit1.*``. Step 2: ``loss_router``, with
        mean and spread of the difficulty, the share above 0.5, and delta, for the log.
        """
        if self.train_router:
            return self._router_losses(batch_inputs, batch_data_samples)
        losses = {}
        for exit, (maps, samples, _) in enumerate(self._both_exits(batch_inputs, batch_data_samples)):
            own = self.branch(exit).loss(self.backbone.select(maps), samples)
            losses.update(rename_loss_dict(f'exit{exit}.', own))
        return losses

    @torch.no_grad()
    def exit_losses(self, batch_inputs: Tensor,
                    batch_data_samples: SampleList) -> Tuple[Tensor, Tensor]:
        """Weighted loss of each image under each exit, as batch 1 gives it, without gradient.

        The backbones run once, on the batch; neck and heads per image, since mmdet's heads average
        over the batch.

        Returns:
            tuple[Tensor, Tensor]: Losses, (2, N), and what the router sees, (N, d); float32.
        """
        both = self._both_exits(batch_inputs, batch_data_samples)
        losses = [[self.parse_losses(own)[0] for own in paired_losses(self._views(both, index))]
                  for index in range(len(batch_data_samples))]
        objects = [len(sample.gt_instances) for sample in batch_data_samples]
        losses = torch.stack([torch.stack(pair) for pair in losses], dim=1).float()
        features = self.router.pool(both[0][0], _valid(batch_inputs, batch_data_samples))
        return weigh(losses, objects, self.weighting), features

    def _views(self, both: List[tuple], index: int) -> List[View]:
        """Both exits' views of one image of a batch."""
        return [
            View(self.branch(exit), tuple(m[index:index + 1] for m in self.backbone.select(maps)),
                 samples[index], ratio) for exit, (maps, samples, ratio) in enumerate(both)
        ]

    def _router_losses(self, batch_inputs: Tensor,
                       batch_data_samples: SampleList) -> Dict[str, Tensor]:
        (first, second), features = self.exit_losses(batch_inputs, batch_data_samples)
        # Kept for the hook that tracks delta online.
        self.last_differences = first - second
        delta = torch.where(self.delta.isnan(), self.last_differences.median(), self.delta)
        phi = self.router.score(features)
        return dict(
            loss_router=router_loss(phi, first, second, delta),
            difficulty=phi.detach().mean(),
            difficulty_std=phi.detach().std(correction=0),
            share_above_half=(phi.detach() > 0.5).float().mean(),
            delta=delta)

    def predict(self,
                batch_inputs: Tensor,
                batch_data_samples: SampleList,
                rescale: bool = True) -> SampleList:
        """Detect; each image leaves at the exit that its difficulty says.

        Args:
            batch_inputs (Tensor): (N, 3, H, W).
            batch_data_samples (list[DetDataSample]): N samples.
            rescale (bool): Whether boxes are in the original image's frame. Defaults to True.

        Returns:
            list[DetDataSample]: In input order; each with ``pred_instances``, ``difficulty``
            (float) and ``exit`` (0 or 1).
        """
        if self._budget_waits:
            self.set_budget(**self.budget)
        maps, ratio = self._first_maps(batch_inputs)
        phi = self.router(maps, _valid(batch_inputs, batch_data_samples))
        # One transfer from the device for both.
        scores, hard = torch.stack([phi, (phi > self.threshold).float()]).tolist()
        for exit, run in enumerate((self._predict_easy, self._predict_hard)):
            rows = [index for index, is_hard in enumerate(hard) if int(is_hard) == exit]
            if not rows:
                continue
            samples = [batch_data_samples[row] for row in rows]
            run(batch_inputs, maps, rows, samples, ratio, rescale)
            for row, sample in zip(rows, samples):
                sample.set_metainfo(dict(difficulty=scores[row], exit=exit))
        return batch_data_samples

    def _predict_easy(self, images: Tensor, maps: tuple, rows: List[int], samples: SampleList,
                      ratio: Ratio, rescale: bool) -> None:
        """Exit 0, into the samples."""
        reduced = reduce_samples(samples, ratio)
        maps = self.backbone.select(_take(maps, rows))
        for sample, own in zip(samples, self.branch(0).predict(maps, reduced, rescale=rescale)):
            sample.pred_instances = own.pred_instances
            if not rescale:
                wide, high = ratio
                sample.pred_instances.bboxes = scale_boxes(own.pred_instances.bboxes,
                                                           (1 / wide, 1 / high))

    def _predict_hard(self, images: Tensor, maps: tuple, rows: List[int], samples: SampleList,
                      ratio: Ratio, rescale: bool) -> None:
        """Exit 1, into the samples."""
        if self.backbone.needs_images:
            images, = _take((images, ), rows)
        maps = self.backbone.second_maps(images, _take(maps, rows))
        self.branch(1).predict(self.backbone.select(maps), samples, rescale=rescale)

    def _forward(self,
                 batch_inputs: Tensor,
                 batch_data_samples: OptSampleList = None) -> Mapping[str, object]:
        """Run every image through both exits, for parity checks, FLOPs counters and export.

        Returns:
            dict: ``difficulty``, (N,), and ``exits``, the raw head outputs of exit 0 and exit 1.
        """
        both = self._both_exits(batch_inputs, batch_data_samples)
        exits = [self.branch(exit)._forward(self.backbone.select(maps), samples)
                 for exit, (maps, samples, _) in enumerate(both)]
        valid = _valid(batch_inputs, batch_data_samples) if batch_data_samples else None
        return dict(difficulty=self.router(both[0][0], valid), exits=exits)


def _take(tensors: Tuple[Tensor, ...], rows: List[int]) -> Tuple[Tensor, ...]:
    """Rows of each tensor; the tensors themselves, not copies, where that is all of them."""
    if len(rows) == len(tensors[0]):
        return tensors
    return tuple(tensor[rows] for tensor in tensors)


def _valid(batch_inputs: Tensor, samples: SampleList) -> List[Tuple[float, float]]:
    """Shares of each image's height and width in the batch that are not padding."""
    height, width = batch_inputs.shape[-2:]
    return [(sample.img_shape[0] / height, sample.img_shape[1] / width) for sample in samples]
