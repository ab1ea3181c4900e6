"""A stock MMDetection detector, twice or more, with a choice in between.

Letters, as in the paper (DynamicDet, arXiv 2304.05552):

* N: images in a batch. x: images, (N, 3, H, W), normalized.
* ``f1``, ``f2``: maps of the first and second backbone, tuples of (N, C_i, H_i, W_i), one per
  stage.
* ``phi``: difficulty, (N,), in [0, 1], large is hard.
* K: exits. Exit 0 is the first backbone with its branch (neck and heads), exit 1 the second with
  its own. Of a pair the exits are two whole detectors.

Here is how it is built and loaded, and what each exit sees. Budgets are in `calibration_state`,
inference in `staged_inference`, regions in `second_look`, step 2 in `router_training`.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from mmengine.model import ModuleList
from torch import Tensor, nn

from mmdet.models.detectors import BaseDetector
from mmdet.models.utils import rename_loss_dict
from mmdet.registry import MODELS
from mmdet.structures import OptSampleList, SampleList

from ..cascade.calibration_state import CalibrationState
from ..cascade.resolution import Ratio, exit_scales, reduce_images
from ..cascade.weights import JOINED, is_plain, rename_entries
from ..errors import UsageError
from ..exchange.origin import require_mmdet
from ..precision import KeepsTypeOfBuffers
from ..routing import GAINS, build_objective
from ..routing.box_merging import Merge
from ..routing.budget import Budget
from ..routing.thresholds import require_exits
from .branch import build_branch, head_types, number_of_classes, require_exits_agree
from .composite import CompositeBackbone, build_backbones
from .normalization import NormalizationChange
from .pairs import each_exit, initial_weights, pad_alike
from .regions import Regions, num_classes_of
from .resolution import reduce_samples, valid_shares
from .router_training import RouterTraining
from .second_look import SecondLook
from .staged_inference import StagedInference


@MODELS.register_module()
class DynamicDetector(
    KeepsTypeOfBuffers, StagedInference, SecondLook, RouterTraining, CalibrationState, BaseDetector
):
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
            see `routing.box_merging.Merge`. Then the necks and heads of all exits up to an image's
            own run. Defaults to None: each exit by itself.
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
        backbone_configs = [
            given or config['backbone']
            for given, config in zip_longest(each_exit(backbone), detectors)
        ]
        several, single = len(detectors) > 1, len(detectors) == backbones == 1
        plain = several or single
        scales = exit_scales(
            len(detectors) if several else max(2, backbones), first_scale, scales, single
        )
        smaller = (regions or {}).get('first_size') is not None
        if not plain and (smaller or min(scales) < 1) and reuse_stages:
            raise UsageError(
                'first_scale must be in (0, 1], and below 1, or where regions have a first_size, '
                'with reuse_stages=0, since the second backbone then needs its own stem; got '
                f'{scales[0]} with reuse_stages={reuse_stages}'
            )
        if single and not smaller and len(set(scales)) < len(scales):
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
        preprocessors = [copy.deepcopy(config.get('data_preprocessor')) for config in detectors]
        preprocessors[0] = copy.deepcopy(data_preprocessor) or preprocessors[0]
        pad_alike(preprocessors)
        super().__init__(
            data_preprocessor=MODELS.build(preprocessors[0]) if preprocessors[0] else None,
            init_cfg=init_cfg or initial_weights(detectors),
        )
        self.num_exits = len(scales)
        self.backbone = build_backbones(backbone_configs, 0 if plain else reuse_stages, backbones)
        if several:
            self.branches = ModuleList(map(build_branch, detectors))
            require_exits_agree(self.branches)
        else:
            self.branches = ModuleList(
                build_branch(detectors[0]) for _ in range(1 if shared else self.num_exits)
            )
        #: What turns images of exit 0 into those of the later exits of a pair.
        self.normalizations = ModuleList(
            NormalizationChange(self.data_preprocessor, MODELS.build(preprocessor))
            for preprocessor in preprocessors[1:]
        )
        router = {'type': 'Router', 'in_channels': self.backbone.channels, **router}
        if router.get('sees', 'maps') != 'maps':
            router.setdefault('classes', number_of_classes(self.branches[0]))
        self.router = MODELS.build(router)
        #: How large each exit sees the image, as a share of its delivered sides.
        self.scales, self.first_scale = scales, scales[0]
        #: Of the deepest map: all but a few detectors have 32; those with more pad to it.
        self.stride = max(32, getattr(self.data_preprocessor, 'pad_size_divisor', 1))
        #: What of an image the second exit looks at; None: all of it.
        self.regions: Regions | None = None
        if regions is not None:
            self.regions = Regions(
                **{'num_classes': num_classes_of(self.branch(0)), 'cell': self.stride, **regions}
            )
        #: The longest side at which exit 0 sees large images, also while these are seen as wholes.
        self.first_size: int | None = (regions or {}).get('first_size')
        #: How exits are merged; may be set at any time.
        self.merge: Merge | None = merge
        self._init_router_learning(objective)
        self.train_router = train_router
        self._init_calibration(budget)
        # Each step trains its own part. Here and not in a hook: the optimizer and DDP look at
        # `requires_grad` before any hook runs.
        for name, parameter in self.named_parameters():
            parameter.requires_grad &= name.startswith('router.') == train_router
        if self.regions is not None and train_router:
            self.router.requires_grad_(False)
            self.regions.router.requires_grad_()

    def train(self, mode: bool = True) -> 'DynamicDetector':
        """In step 2 all but the router stays in eval mode, whatever a loop asks for."""
        super().train(mode)
        if self.train_router:
            for name, module in self.named_children():
                if name not in ('router', 'data_preprocessor'):
                    module.eval()
        return self

    @property
    def trained_router(self) -> nn.Module:
        """What step 2 trains: the router of images or that of regions."""
        return self.router if self.regions is None else self.regions.router

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
            UsageError: If it is of one plain detector, and the exits are several; or of Detectron2.
        """
        require_mmdet(state_dict)
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
        if not exit and self.first_size is not None:
            scale = min(scale, self.first_size / max(batch_inputs.shape[-2:]))
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
        with mean and spread of the difficulty, the share above 0.5, and delta, for the log.
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

    @property
    def _needs_images(self) -> bool:
        return len(self.backbone.names) == 1 or self.backbone.needs_images

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
        valid = valid_shares(batch_inputs, batch_data_samples) if batch_data_samples else None
        return dict(difficulty=self.router(every[0][0], valid), exits=exits)
