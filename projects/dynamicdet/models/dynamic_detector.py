"""A stock MMDetection detector, twice or more, with a choice in between.

Letters, as in the paper (DynamicDet, arXiv 2304.05552):

* N: images in a batch. x: images, (N, 3, H, W), normalized.
* ``f1``, ``f2``: maps of the first and second backbone, tuples of (N, C_i, H_i, W_i), one per
  stage.
* ``phi``: difficulty, (N,), in [0, 1], large is hard.
* K: exits. Exit 0 is the first backbone with its branch (neck and heads), exit 1 the second with
  its own. Of a pair the exits are two whole detectors.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.model import ModuleList
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet.models.detectors import BaseDetector
from mmdet.models.utils import rename_loss_dict
from mmdet.registry import MODELS
from mmdet.structures import OptSampleList, SampleList

from ..errors import UsageError
from ..precision import KeepsTypeOfBuffers
from ..routing import (
    GAINS,
    build_objective,
    class_aps,
    class_weights,
    image_aps,
    quantiles_of,
    resolve_threshold,
)
from ..routing.budget import Budget
from ..routing.detection_features import features as detection_features
from ..routing.merging import Merge, scale_scores
from ..routing.record import Detections
from ..routing.regions import price_of_threshold
from ..routing.thresholds import Thresholds, require_exits
from ..transfers import to_host
from .batch_state import BatchState
from .branch import build_branch, head_types, number_of_classes, require_exits_agree
from .composite import CompositeBackbone, build_backbones
from .kept_outputs import Outputs
from .merging import merge_instances
from .normalization import NormalizationChange
from .paired_losses import ExitView, paired_losses
from .pairs import each_exit, initial_weights, pad_alike
from .regions import (
    Crop,
    Regions,
    batches_of,
    canvas_of,
    crops_of,
    cut_images,
    cut_maps,
    join_crops,
    num_classes_of,
    sample_of_crop,
    to_whole_image,
)
from .resolution import Ratio, exit_scales, reduce_images, reduce_samples, scale_boxes
from .weights import JOINED, is_plain, rename_entries


@MODELS.register_module()
class DynamicDetector(KeepsTypeOfBuffers, BaseDetector):
    """Make any mmdet detector dynamic.

    Trained in two steps: first the cascade (both exits, ``train_router=False``), then the router
    alone (``train_router=True``). Used at any speed: see ``budget``.

    Args:
        detector (dict or list[dict]): Config of the stock detector. A list is of several whole
            detectors, one for each exit (a *pair*), with their own backbone, neck, heads and
            normalization: they must know the same number of classes.
        backbone (dict or list[dict], optional): Config of each of the two backbones; of a pair, a
            list. Defaults to the detector's; where both are given, this one counts. The shipped
            configs name it, since mmdet's ``init_detector`` looks for ``model.backbone``.
        shared (bool): Whether all exits use one neck and one set of heads, as two-stage
            detectors do; YOLO variants have one per exit. A pair shares none. Defaults to True.
        backbones (int): How many, each fed by the one before, with an exit behind each. 1 makes two
            exits of one backbone that differ by resolution alone: it takes ``first_scale`` below 1.
            A pair has its own. Defaults to 2, the paper's.
        reuse_stages (int): Leading stages that the second backbone takes over from the first;
            see `CompositeBackbone`. One backbone and pairs have none. Defaults to 1.
        first_scale (float): How large exit 0 sees the image, as a share of its delivered sides, in
            (0, 1]; later exits see it as delivered. Below 1 two backbones take ``reuse_stages=0``.
            Defaults to 1.
        scales (Sequence[float], optional): The same of each exit, rising for most uses, the last
            usually 1; in place of ``first_scale``. One backbone has as many exits as there are.
        router (dict): Config of the router; ``type`` and ``in_channels`` are filled in. Defaults to
            the paper's.
        train_router (bool): Whether this is step 2. Then nothing but the router can change.
            Defaults to False.
        objective (str or dict): What the router learns in step 2, a key of `routing.OBJECTIVES` or
            ``dict(type=key, ...)`` with settings of `routing.Objective`. Defaults to 'paper'.
        budget (dict, optional): The wanted speed: one of ``threshold`` in [-1, 1], ``hard_share``
            in [0, 1], ``target_latency`` in seconds, ``target_gflops``; the last three need a
            calibrated checkpoint. Defaults to the checkpoint's threshold.
        merge (str or dict, optional): What an image finds at the exits before its own joins what
            it finds there, by class: 'nms', 'wbf' or ``dict(type=..., iou=..., conf_type=...)``,
            see `routing.merging.Merge`. Then the necks and heads of all exits up to an image's own
            run. Defaults to None: each exit by itself.
        regions (dict, optional): Arguments of `Regions`, ``dict()`` for its own: the second exit
            looks at some regions of an image alone, which exit 0's detections say. Then the neck
            and heads of exit 0 run on every image; a threshold is a price, and ``hard_share`` a
            share of the pixels. Takes two exits. Defaults to None: whole images, by the router.
        data_preprocessor (dict, optional): Defaults to the detector's; of a pair, the first's, with
            padding that suits all.
        init_cfg (dict, optional): As in mmengine. A checkpoint of the plain detector fills both
            exits; those of a pair have a name together, see `weights.join_checkpoints`. Defaults
            to the detector's.
    """

    def __init__(
        self,
        detector: dict | Sequence[dict],
        backbone: dict | Sequence[dict] | None = None,
        shared: bool = True,
        backbones: int = 2,
        reuse_stages: int = 1,
        first_scale: float = 1.0,
        scales: Sequence[float] | None = None,
        router: dict = dict(type='Router'),
        train_router: bool = False,
        objective: str | dict = 'paper',
        budget: dict | None = None,
        merge: str | dict | None = None,
        regions: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        merge = Merge.parse(merge)
        for name, value in dict(backbones=backbones, first_scale=first_scale).items():
            if not isinstance(value, (int, float)) or name == 'backbones' and value != int(value):
                raise UsageError(f'{name} must be a number, and backbones a whole one; got {value}')
        objective = build_objective(objective)
        if train_router and GAINS[objective.gain].values == 'reward':
            raise UsageError(
                "gain 'reward' is of a whole set: fit the router to a record (tools/fit_router.py)"
            )
        detectors = each_exit(detector)
        own_backbones = [
            own or one['backbone'] for own, one in zip_longest(each_exit(backbone), detectors)
        ]
        several, single = len(detectors) > 1, len(detectors) == backbones == 1
        plain = several or single
        scales = exit_scales(
            len(detectors) if several else max(2, backbones), first_scale, scales, single
        )
        if not plain and min(scales) < 1 and reuse_stages:
            raise UsageError(
                'first_scale must be in (0, 1], and below 1 with reuse_stages=0, since the second '
                f'backbone then needs its own stem; got {scales[0]} with '
                f'reuse_stages={reuse_stages}'
            )
        if single and len(set(scales)) < len(scales):
            raise UsageError(
                'one backbone has two exits only where they differ by resolution: give first_scale '
                'below 1, or two backbones'
            )
        if regions is not None and len(scales) != 2:
            raise UsageError(f'regions take two exits; got {len(scales)}')
        budget = Budget.parse(budget)
        if budget is not None:
            require_exits(budget, len(scales))
        if train_router and router.get('sees', 'maps') != 'maps':
            raise UsageError(
                f'a router that sees {router["sees"]} is fitted to records, not trained: see '
                'tools/fit_router.py'
            )
        preprocessors = [copy.deepcopy(one.get('data_preprocessor')) for one in detectors]
        preprocessors[0] = copy.deepcopy(data_preprocessor) or preprocessors[0]
        pad_alike(preprocessors)
        super().__init__(
            data_preprocessor=MODELS.build(preprocessors[0]) if preprocessors[0] else None,
            init_cfg=init_cfg or initial_weights(detectors),
        )
        self.num_exits = len(scales)
        self.backbone = build_backbones(own_backbones, 0 if plain else reuse_stages, backbones)
        if several:
            self.branches = ModuleList(map(build_branch, detectors))
            require_exits_agree(self.branches)
        else:
            self.branches = ModuleList(
                build_branch(detectors[0]) for _ in range(1 if shared else self.num_exits)
            )
        #: What turns images of exit 0 into those of the later exits of a pair.
        self.normalizations = ModuleList(
            NormalizationChange(self.data_preprocessor, MODELS.build(one))
            for one in preprocessors[1:]
        )
        router = {'type': 'Router', 'in_channels': self.backbone.channels, **router}
        if router.get('sees', 'maps') != 'maps':
            router.setdefault('classes', number_of_classes(self.branches[0]))
        self.router = MODELS.build(router)
        #: How large each exit sees the image, as a share of its delivered sides.
        self.scales, self.first_scale = scales, scales[0]
        #: Of the deepest map: all but a few detectors have 32; those with more pad to it.
        self.stride = max(32, getattr(self.data_preprocessor, 'pad_size_divisor', 1))
        self.objective = objective
        #: What of an image the second exit looks at; None: all of it.
        self.regions: Regions | None = None
        if regions is not None:
            self.regions = Regions(
                **{'num_classes': num_classes_of(self.branch(0)), 'cell': self.stride, **regions}
            )
        #: How exits are merged; may be set at any time.
        self.merge: Merge | None = merge
        # Quantiles of the training set's gains, (101,); NaN until `RouterHook` has measured them,
        # which also keeps them in the checkpoint: they matter to step 2 alone.
        self.register_buffer('gains', torch.full((101,), float('nan')), persistent=False)
        # Objects of each class in the training set, for gains by class; as the quantiles.
        self.register_buffer('class_counts', torch.zeros(0), persistent=False)
        self.budget: Budget | None = budget
        self.train_router = train_router
        # Between exit k and k + 1, ascending; of two exits a single number.
        shape = () if self.num_exits == 2 else (self.num_exits - 1,)
        self.register_buffer('threshold', torch.full(shape, 0.5))
        # NaN: not measured yet.
        self.register_buffer('delta', torch.tensor(float('nan')))
        # The calibration: sorted difficulties of the validation set, (n,), and what each exit
        # costs, seconds and GFLOPs (2 x multiply-adds) per image. Empty until tools/calibrate.py
        # fills them.
        self.register_buffer('difficulties', torch.zeros(0))
        self.register_buffer('latencies', torch.full((self.num_exits,), float('nan')))
        self.register_buffer('gflops', torch.full((self.num_exits,), float('nan')))
        # Of the logit of each exit's scores, which are compared where exits are merged, and in any
        # AP; see `routing.merging.scale_scores`.
        self.register_buffer('platt_scale', torch.ones(self.num_exits))
        self.register_buffer('platt_shift', torch.zeros(self.num_exits))
        # The same on the host, which decides whether there is anything to scale, and would have to
        # wait for the device.
        self._scaling = [(1.0, 0.0)] * self.num_exits
        #: Said to who asks for a mean latency: how these differ from those here. See
        #: `timing.timed_elsewhere`.
        self.timed_elsewhere: str | None = None
        self._apply_budget()
        # Each step trains its own part. Here and not in a hook: the optimizer and DDP look at
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

    @property
    def needs_step_one(self) -> bool:
        """Whether plain weights leave something of the exits to train: connections between
        backbones. One backbone and pairs have none."""
        return isinstance(self.backbone, CompositeBackbone) and len(self.backbone.names) > 1

    @property
    def whole_detectors(self) -> list[list[nn.Module]]:
        """What is a detector by itself: each exit of a pair, else all."""
        if not len(self.normalizations):
            return [[self]]
        return [list(parts) for parts in zip(self.backbone.nets, self.branches)]

    @property
    def has_comparable_losses(self) -> bool:
        """Whether losses of the exits can be compared: those of other kinds of heads cannot."""
        return len({head_types(branch) for branch in self.branches}) == 1

    # Loading.

    def spread_plain_weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the entries of a plain detector's checkpoint to those of all exits.

        A dynamic detector's own checkpoint comes back as it is. Entries that match nothing keep
        their name, so that whoever loads names them.

        Raises:
            UsageError: If it is of one plain detector, and the exits are several.
        """
        if self.regions is None:
            # Where whole images are seen, what was fitted to regions is not needed.
            state_dict = {
                key: value for key, value in state_dict.items() if not key.startswith('regions.')
            }
        if not is_plain(state_dict):
            return dict(state_dict)
        if len(self.normalizations) and any(key.startswith('backbone.') for key in state_dict):
            raise UsageError(
                f'this checkpoint is of one plain detector, and the config has {self.num_exits}: '
                f'name one of each in their order, as {JOINED}FIRST.pth,SECOND.pth'
            )
        known, spread = set(self.state_dict()), {}
        for key, value in state_dict.items():
            if key.startswith('backbone.'):
                rest = key[len('backbone.') :]
                targets = [f'backbone.{name}.{rest}' for name in self.backbone.names]
            else:
                targets = [f'branches.{index}.{key}' for index in range(len(self.branches))]
            spread.update({name: value for name in targets if name in known} or {key: value})
        return spread

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Take checkpoints of plain detectors, for all exits, and calibrations of any length."""
        entries = rename_entries(state_dict, prefix, self.spread_plain_weights)
        # Checkpoints from before exits could be merged lack it.
        for name in ('platt_scale', 'platt_shift'):
            state_dict.setdefault(prefix + name, getattr(self, name))
        if 'difficulties' in entries:
            self.difficulties = self.difficulties.new_empty(entries['difficulties'].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._scaling = list(zip(self.platt_scale.tolist(), self.platt_shift.tolist()))
        self._apply_budget()

    # Speed.

    def set_budget(
        self,
        budget: Budget | Mapping[str, float | Sequence[float]] | None = None,
        **named: float | Sequence[float],
    ) -> Thresholds:
        """Choose the speed.

        Args:
            budget (Budget or Mapping): A threshold, a share of the calibration's hard images, or
                mean seconds or GFLOPs per image as they were calibrated; see `Budget.parse`. For
                K > 2 exits a threshold or a hard share may also be a list of K - 1: rising
                thresholds, or the shares that go beyond exit 0, 1, ..., falling.
            **named: The same by name: ``set_budget(hard_share=0.5)``.

        Returns:
            float or list[float]: The threshold; K - 1 of them for K > 2 exits.

        Raises:
            UsageError: If out of range, or if the model is not calibrated and needs to be.
        """
        budget = Budget.parse(budget, **named)
        if self.regions is not None:
            thresholds = self.regions.threshold_for(budget)
        else:
            thresholds = resolve_threshold(
                budget, self.difficulties.tolist(), self.latencies.tolist(), self.gflops.tolist()
            )
        self.threshold.copy_(torch.tensor(thresholds))
        self.budget, self._budget_waits = budget, False
        if budget.kind == 'target_latency' and self.timed_elsewhere:
            warnings.warn(self.timed_elsewhere)
        return thresholds

    def _apply_budget(self) -> None:
        """Set the threshold as soon as what the config's budget needs is loaded."""
        # Where there are regions, their calibration is loaded after this.
        ready = self.regions is None and len(self.difficulties)
        if self.budget and (self.budget.kind == 'threshold' or ready):
            self.set_budget(self.budget)
        else:
            self._budget_waits = self.budget is not None

    def set_platt_scaling(self, scaling: Sequence[tuple[float, float]]) -> None:
        """Choose scale and shift of the logit of each exit's scores, K pairs; see
        `routing.merging.scale_scores`."""
        values = self.platt_scale.new_tensor(scaling)
        self.platt_scale.copy_(values[:, 0])
        self.platt_shift.copy_(values[:, 1])
        self._scaling = [(scale, shift) for scale, shift in values.tolist()]

    # Forward.

    def score(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> Tensor:
        """Difficulty of each image, (N,), by the first backbone and the router alone; where the
        router sees detections, or regions are looked at again, by exit 0's, too."""
        if self.regions is not None:
            state = self.start(batch_inputs, batch_data_samples)
            return torch.tensor(state.difficulties, device=batch_inputs.device)
        return self._first_state(batch_inputs, batch_data_samples)[1]

    def branch(self, exit: int) -> BaseDetector:
        """Neck and heads of an exit, 0 to K - 1."""
        return self.branches[min(exit, len(self.branches) - 1)]

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """``f1``, as the first branch's neck leaves it."""
        maps, _ = self._first_maps(batch_inputs)
        return self.branch(0).extract_feat(self.backbone.select(maps))

    def exit_images(
        self, exit: int, batch_inputs: Tensor, samples: OptSampleList = None
    ) -> tuple[Tensor, Ratio]:
        """A delivered batch, (N, 3, H, W), as an exit sees it: normalized and as large as its
        detector wants it; and how large that is, see `resolution`. Samples say what is padding."""
        if exit and len(self.normalizations):
            shapes = samples and [sample.img_shape for sample in samples]
            batch_inputs = self.normalizations[exit - 1](batch_inputs, shapes)
        scale = self.scales[exit]
        if self.regions is not None and not exit:
            scale = self.regions.first_scale(scale, tuple(batch_inputs.shape[-2:]))
        return reduce_images(batch_inputs, scale, self.stride)

    def _first_maps(self, batch_inputs: Tensor) -> tuple[tuple, Ratio]:
        """``f1``, and how large the images were that it was made from."""
        images, ratio = self.exit_images(0, batch_inputs)
        return self.backbone.first_maps(images), ratio

    def deeper_maps(
        self, exit: int, batch_inputs: Tensor | None, maps: tuple, samples: OptSampleList = None
    ) -> tuple:
        """The maps of an exit from 1 on, from those of the exit before."""
        return self._deeper_maps(exit, batch_inputs, maps, samples)[0]

    def _deeper_maps(
        self, exit: int, batch_inputs: Tensor | None, maps: tuple, samples: OptSampleList = None
    ) -> tuple[tuple, Ratio]:
        """And how large the images were."""
        images, ratio = batch_inputs, (1.0, 1.0)
        if self._needs_images:
            images, ratio = self.exit_images(exit, batch_inputs, samples)
        if len(self.backbone.names) == 1:
            return self.backbone.first_maps(images), ratio
        return self.backbone.deeper_maps(images, maps, exit), ratio

    def _all_exits(self, batch_inputs: Tensor, samples: OptSampleList) -> list[tuple]:
        """Maps, data samples and ratio of each exit: as the exit sees the batch. Each has samples
        of its own, since heads write into them."""
        maps, ratio = self._first_maps(batch_inputs)
        exits = [(maps, reduce_samples(samples, ratio), ratio)]
        for exit in range(1, self.num_exits):
            maps, ratio = self._deeper_maps(exit, batch_inputs, maps, samples)
            exits.append((maps, reduce_samples(samples, ratio), ratio))
        return exits

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of the step that is trained.

        Step 1: all exits' own losses, named ``exit0.*``, ``exit1.*``, ... Step 2: ``loss_router``,
            with
        mean and spread of the difficulty, the share above 0.5, and delta, for the log.
        """
        if self.train_router:
            return self._router_losses(batch_inputs, batch_data_samples)
        losses = {}
        for exit, (maps, samples, _) in enumerate(
            self._all_exits(batch_inputs, batch_data_samples)
        ):
            branch_losses = self.branch(exit).loss(self.backbone.select(maps), samples)
            losses.update(rename_loss_dict(f'exit{exit}.', branch_losses))
        return losses

    @torch.no_grad()
    def exit_losses(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> tuple[Tensor, Tensor]:
        """Loss of each image under each exit, as batch 1 gives it, without gradient.

        The backbones run once, on the batch; neck and heads per image, since mmdet's heads average
        over the batch.

        Returns:
            tuple[Tensor, Tensor]: Losses, (K, N), and what the router sees, (N, d); float32.
        """
        every = self._all_exits(batch_inputs, batch_data_samples)
        features = self.router.pool(every[0][0], _valid(batch_inputs, batch_data_samples))
        return self._image_losses(every), features

    @torch.inference_mode()
    def losses_of_states(
        self, states: Sequence[BatchState], outputs: Sequence[Outputs] | None = None
    ) -> Tensor:
        """`exit_losses` of a batch that stands before each exit, (K, N): no backbone runs again.

        Args:
            states (Sequence[BatchState]): Of the same images, one for each exit.
            outputs (Sequence[Outputs], optional): What the branches gave when these states were
                finished, see `kept_outputs`: not computed again either.
        """
        every = [(one.maps, reduce_samples(one.samples, one.ratio), one.ratio) for one in states]
        for _, samples, _ in every:
            for sample in samples:
                # Losses do not look at it, and detectors copy what they are given.
                if 'pred_instances' in sample:
                    del sample.pred_instances
        return self._image_losses(every, outputs)

    def _image_losses(self, every: list[tuple], outputs: Sequence[Outputs] | None = None) -> Tensor:
        """(K, N), float32; ``every`` as `_all_exits` gives it."""
        if not self.has_comparable_losses:
            kinds = ' and '.join(head_types(branch)[0] for branch in self.branches)
            raise UsageError(
                f'losses of {kinds} cannot be compared: choose an objective that counts AP, such '
                "as objective='ap'"
            )
        outputs = outputs or [Outputs()] * len(every)
        losses = [
            [
                self.parse_losses(exit_losses)[0]
                for exit_losses in paired_losses(self._views(every, index, outputs))
            ]
            for index in range(len(every[0][1]))
        ]
        return torch.stack([torch.stack(pair) for pair in losses], dim=1).float()

    @torch.no_grad()
    def exit_gains(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> tuple[Tensor, Tensor]:
        """What each image gains by the last exit, as the objective counts it, without gradient.

        Returns:
            tuple[Tensor, Tensor]: Gains, (N,), and what the router sees, (N, d); float32.
        """
        if self.objective.by_class:
            parts, counts, features = self.class_gains(batch_inputs, batch_data_samples)
            self.last_class_counts = counts.sum(0)
            return self.weighted_gains(parts), features
        # Before the losses: some heads write into the annotations that they are given.
        objects = [len(sample.gt_instances) for sample in batch_data_samples]
        measure = self.exit_losses
        if GAINS[self.objective.gain].values == 'ap':
            measure = self._exit_aps
        values, features = measure(batch_inputs, batch_data_samples)
        return self.objective.gains(values, objects), features

    @torch.no_grad()
    def class_gains(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What each image gains by the last exit, class by class, to be weighted by class.

        An image's loss is no sum over classes: its gain goes to its objects in equal parts. Its AP
        is one of each class, which counts for each of its objects.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Parts of the gain, (N, C + 1), the last of which is the
                gain of images without objects, whose weight is 1; objects, (N, C), C being as large
                as the batch's labels ask for; and what the router sees, (N, d). float32.
        """
        labels = [sample.gt_instances.labels.clone() for sample in batch_data_samples]
        classes = max((int(own.max()) + 1 for own in labels if len(own)), default=0)
        counts = torch.stack([torch.bincount(own, minlength=classes) for own in labels]).float()
        if GAINS[self.objective.gain].values == 'ap':
            values, features = self._exit_aps(batch_inputs, batch_data_samples, classes)
            return F.pad(values[-1] - values[0], (0, 1)), counts, features
        losses, features = self.exit_losses(batch_inputs, batch_data_samples)
        objects = counts.sum(1)
        gains = self.objective.gains(losses, objects.tolist())[:, None]
        shares = torch.cat([counts / objects.clamp(min=1)[:, None], (objects == 0)[:, None]], 1)
        return gains * shares, counts, features

    def weighted_gains(self, parts: Tensor) -> Tensor:
        """Gains by class, (N,), of what `class_gains` gives, (N, C + 1), by the objects of each
        class that are known so far (``class_counts``); by none, all weigh the same."""
        classes = parts.shape[1] - 1
        counts = F.pad(self.class_counts, (0, max(0, classes - len(self.class_counts))))
        weights = parts.new_tensor(class_weights(counts.tolist())[:classes])
        return parts[:, :-1] @ weights + parts[:, -1]

    def _exit_aps(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, classes: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """AP of each image by itself under each exit, (K, N), percent, and what the router sees;
        with a number of classes `class_aps`, (K, N, C), instead."""
        every = self._all_exits(batch_inputs, batch_data_samples)
        found, truths = [], []
        for exit, (maps, samples, _) in enumerate(every):
            # Copies: predictions are written into the samples.
            predictions = self.branch(exit).predict(
                self.backbone.select(maps), reduce_samples(samples, (1.0, 1.0)), rescale=False
            )
            found.append([sample.pred_instances for sample in predictions])
            truths.append([_annotations(sample) for sample in samples])
        if self.merge:
            # The last exit sees images as delivered.
            found = self._merged_exits(found, [ratio for *_, ratio in every])
            truths = truths[-1:] * self.num_exits
        detections = [_as_arrays(own) for own in found]
        features = self.router.pool(every[0][0], _valid(batch_inputs, batch_data_samples))
        aps = (
            image_aps(detections, truths)
            if classes is None
            else class_aps(detections, truths, classes)
        )
        return features.new_tensor(aps), features

    def _merged_exits(
        self, found: list[list[InstanceData]], ratios: Sequence[Ratio]
    ) -> list[list[InstanceData]]:
        """What each exit finds in the delivered frame, that of the exits before merged into it.

        Args:
            found (list[list[InstanceData]]): By exit and image, in the frame that the exit sees.
            ratios (Sequence[Ratio]): How large each exit sees the images.
        """
        for exit, ((wide, high), own) in enumerate(zip(ratios, found)):
            for one in own:
                self._scale_scores(exit, one)
                one.bboxes = scale_boxes(one.bboxes, (1 / wide, 1 / high))
        images = list(zip(*found))
        return [
            merge_instances([image[: exit + 1] for image in images], self.merge)
            for exit in range(self.num_exits)
        ]

    def _views(self, every: list[tuple], index: int, outputs: Sequence[Outputs]) -> list[ExitView]:
        """All exits' views of one image of a batch."""
        return [
            ExitView(
                self.branch(exit),
                tuple(m[index : index + 1] for m in self.backbone.select(maps)),
                samples[index],
                ratio,
                outputs[exit],
                index,
            )
            for exit, (maps, samples, ratio) in enumerate(every)
        ]

    def _router_losses(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        gains, features = self.exit_gains(batch_inputs, batch_data_samples)
        # Kept for the hook that tracks their distribution online.
        self.last_gains = gains
        quantiles = (
            quantiles_of(gains.tolist()).to(gains.device)
            if self.gains.isnan().any()
            else self.gains
        )
        logits = self.router.logits(features)
        phi = logits.detach().sigmoid()
        return dict(
            loss_router=self.objective.loss(logits, gains, quantiles),
            difficulty=phi.mean(),
            difficulty_std=phi.std(correction=0),
            share_above_half=(phi > 0.5).float().mean(),
            delta=quantiles[len(quantiles) // 2],
        )

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Detect; each image leaves at the exit that its difficulty says.

        Args:
            batch_inputs (Tensor): (N, 3, H, W).
            batch_data_samples (list[DetDataSample]): N samples.
            rescale (bool): Whether boxes are in the original image's frame. Defaults to True.

        Returns:
            list[DetDataSample]: In input order; each with ``pred_instances``, ``difficulty``
            (float) and ``exit`` (0 to K - 1).
        """
        state = self.start(batch_inputs, batch_data_samples, rescale)
        while True:
            if self.merge:
                # All at once, those that leave and those that go on.
                self.detect(state, rescale)
            leaving, going_on = state.split()
            if len(leaving):
                self.finish(leaving, rescale)
            if not len(going_on):
                return batch_data_samples
            state = self.deepen(going_on, rescale)

    def start(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> BatchState:
        """Run the first backbone and the router: all that is known before the first exit. Where the
        router sees detections, or regions are looked at again, exit 0's neck and heads, too.

        Between this, ``finish`` and ``deepen`` images may wait, part and join others: see
        `apis.stream`.
        """
        if self._budget_waits:
            self.set_budget(self.budget)
        if self.regions is not None:
            maps, ratio = self._first_maps(batch_inputs)
            images = batch_inputs if self._needs_images else None
            state = BatchState(0, images, maps, ratio, batch_data_samples, [], [])
            return self._choose_regions(state, rescale)
        state, phi = self._first_state(batch_inputs, batch_data_samples, rescale)
        # One transfer from the device for both.
        difficulties, exits = torch.stack([phi, self._exits_of(phi).float()]).tolist()
        return replace(state, difficulties=difficulties, exits=[int(one) for one in exits])

    def _first_state(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> tuple[BatchState, Tensor]:
        """A batch before the first exit, not routed yet, and its difficulties, (N,)."""
        maps, ratio = self._first_maps(batch_inputs)
        images = batch_inputs if self._needs_images else None
        state = BatchState(0, images, maps, ratio, batch_data_samples, [], [])
        valid = _valid(batch_inputs, batch_data_samples)
        if not self.router.sees_detections:
            return state, self.router(maps, valid)
        self.detect(state, rescale)
        return state, self.router(maps, valid, self._detection_features(state, rescale))

    def _detection_features(self, state: BatchState, rescale: bool) -> Tensor:
        """What the router sees of exit 0's detections, (N, w), boxes in the original frame."""
        found = []
        for sample, (boxes, scores, labels) in zip(
            state.samples, to_host([own[0] for own in state.found])
        ):
            if not rescale:
                boxes = boxes / boxes.new_tensor([*sample.scale_factor] * 2)
            # New: what was found may still be what results are made of.
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
            found.append((boxes.numpy(), scores.numpy(), labels.numpy()))
        joined = Detections.join(found)
        weights = self.router.class_weights.cpu().numpy()[joined.categories]
        return self.threshold.new_tensor(detection_features(joined, weights), dtype=torch.float32)

    def _choose_regions(self, state: BatchState, rescale: bool) -> BatchState:
        """Run the first exit's neck and heads, and say what is worth a second look."""
        self.detect(state, rescale)
        gains = self.regions.gain_maps(
            [own[0] for own in state.found], state.samples, state.maps, state.ratio, rescale
        )
        return self._with_regions(state, gains)

    def _with_regions(self, state: BatchState, gains: Sequence[np.ndarray]) -> BatchState:
        """Choose what is worth its price, of the gains of each image's cells, N times (h, w)."""
        regions, threshold = self.regions, float(self.threshold)
        whole = price_of_threshold(threshold) <= 0
        chosen = [[] if whole else regions.choose(own, threshold) for own in gains]
        return replace(
            state,
            difficulties=[regions.difficulty(own) for own in gains],
            exits=[int(whole or len(own) > 0) for own in chosen],
            regions=chosen,
        )

    def _look_again(self, state: BatchState, rescale: bool) -> BatchState:
        """Run the second exit on regions of images, neck and heads included, and join what it finds
        with what the first found. No more pixels are in memory at a time than the images have."""
        settings = self.regions
        crops = crops_of(state.regions, state.samples, settings)
        height, width = canvas_of(state.samples)
        parts: list[list] = [[] for _ in state.samples]
        for some in batches_of(crops, len(state) * height * width):
            for crop, found in zip(some, self._found_in(state, some, rescale)):
                whole = to_whole_image(found, crop, state.samples[crop.row], rescale)
                parts[crop.row].append((crop, whole))
        found = [
            {1: join_crops(own[0], part, sample, settings, self.merge, rescale)}
            for own, part, sample in zip(state.found, parts, state.samples)
        ]
        return replace(state, exit=1, maps=(), ratio=(1.0, 1.0), found=found)

    def _found_in(
        self, state: BatchState, crops: Sequence[Crop], rescale: bool
    ) -> list[InstanceData]:
        """What the second exit finds in crops of equal size, in their own frames."""
        images = None if state.images is None else cut_images(state.images, crops)
        maps = cut_maps(state.maps, canvas_of(state.samples), crops)
        samples = [sample_of_crop(state.samples[crop.row], crop) for crop in crops]
        maps, ratio = self._deeper_maps(1, images, maps, samples)
        return self._found_by(BatchState(1, images, maps, ratio, samples, [], []), rescale)

    def deepen(self, state: BatchState, rescale: bool = True) -> BatchState:
        """Run the next backbone on images that go on; where exits are merged, this exit's neck and
        heads before it, unless they ran. Where regions are looked at again, the next exit's, too:
        ``rescale`` is as of `predict`."""
        if any(state.regions):
            return self._look_again(state, rescale)
        if self.merge:
            self.detect(state, rescale)
        maps, ratio = self._deeper_maps(state.exit + 1, state.images, state.maps, state.samples)
        found = [dict(own) if self.merge else {} for own in state.found]
        return replace(state, exit=state.exit + 1, maps=maps, ratio=ratio, found=found)

    def detect(self, state: BatchState, rescale: bool = True) -> None:
        """Run this exit's neck and heads on the images of a batch state, unless they ran; what they
        find is kept in the state, for this exit and those behind it."""
        if not all(state.exit in own for own in state.found):
            for own, found in zip(state.found, self._found_by(state, rescale)):
                own[state.exit] = found

    def finish(self, state: BatchState, rescale: bool = True) -> SampleList:
        """Run this exit's neck and heads on all images of a batch state; results go into the
        samples, merged with those of the exits before where that is wanted."""
        if self.merge or self.regions is not None:
            self.detect(state, rescale)
        if self.merge:
            found = merge_instances(
                [[own[exit] for exit in sorted(own)] for own in state.found], self.merge
            )
        elif all(state.exit in own for own in state.found):
            found = [own[state.exit] for own in state.found]
        else:
            found = self._found_by(state, rescale)
        for row, (sample, own) in enumerate(zip(state.samples, found)):
            sample.pred_instances = own
            sample.set_metainfo(dict(difficulty=state.difficulties[row], exit=state.exit))
            if self.regions is not None:
                sample.set_metainfo(
                    dict(regions=self.regions.boxes_of(state.regions[row], sample, state.exit))
                )
        return state.samples

    def _exits_of(self, phi: Tensor) -> Tensor:
        """The exit of each image, (N,), by its difficulty, (N,)."""
        return (phi[:, None] > self.threshold.reshape(1, -1)).sum(1)

    @property
    def _needs_images(self) -> bool:
        return len(self.backbone.names) == 1 or self.backbone.needs_images

    def _found_by(self, state: BatchState, rescale: bool) -> list[InstanceData]:
        """What the neck and heads of an exit find, its scores scaled; see `predict` for the
        frame."""
        exit, samples, ratio = state.exit, state.samples, state.ratio
        reduced = reduce_samples(samples, ratio) if ratio != (1.0, 1.0) else samples
        predictions = self.branch(exit).predict(
            self.backbone.select(state.maps), reduced, rescale=rescale
        )
        every = [prediction.pred_instances for prediction in predictions]
        for found in every:
            self._scale_scores(exit, found)
            if not rescale and ratio != (1.0, 1.0):
                wide, high = ratio
                found.bboxes = scale_boxes(found.bboxes, (1 / wide, 1 / high))
        return every

    def _scale_scores(self, exit: int, found: InstanceData) -> None:
        """Write an exit's scores anew, as comparable with those of others."""
        found.scores = scale_scores(found.scores, *self._scaling[exit])

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: OptSampleList = None
    ) -> Mapping[str, object]:
        """Run every image through all exits, for parity checks, FLOPs counters and export.

        Returns:
            dict: ``difficulty``, (N,), and ``exits``, the raw head outputs of exit 0 to K - 1.
        """
        every = self._all_exits(batch_inputs, batch_data_samples)
        exits = [
            self.branch(exit)._forward(self.backbone.select(maps), samples)
            for exit, (maps, samples, _) in enumerate(every)
        ]
        valid = _valid(batch_inputs, batch_data_samples) if batch_data_samples else None
        return dict(difficulty=self.router(every[0][0], valid), exits=exits)


def _valid(batch_inputs: Tensor, samples: SampleList) -> list[tuple[float, float]]:
    """Shares of each image's height and width in the batch that are not padding."""
    height, width = batch_inputs.shape[-2:]
    return [(sample.img_shape[0] / height, sample.img_shape[1] / width) for sample in samples]


def _as_arrays(instances: Sequence[InstanceData]) -> list[dict[str, np.ndarray]]:
    """Boxes, labels and scores of images, as `image_aps` takes them."""
    return [
        dict(bboxes=boxes.numpy(), labels=labels.numpy(), scores=scores.numpy())
        for boxes, scores, labels in to_host(instances)
    ]


def _annotations(sample) -> dict[str, np.ndarray]:
    """What an image holds, as `image_aps` takes it: what mmdet ignores are crowds."""
    every = [sample.gt_instances]
    if len(sample.get('ignored_instances', ())):
        every.append(sample.ignored_instances)
    # Annotations have no scores, and nobody looks at them.
    parts = _as_arrays(
        [
            InstanceData(bboxes=instances.bboxes, labels=instances.labels, scores=instances.labels)
            for instances in every
        ]
    )
    crowds = [np.full(len(part['labels']), bool(index)) for index, part in enumerate(parts)]
    return dict(
        bboxes=np.concatenate([part['bboxes'].reshape(-1, 4) for part in parts]),
        labels=np.concatenate([part['labels'] for part in parts]),
        crowds=np.concatenate(crowds),
    )
