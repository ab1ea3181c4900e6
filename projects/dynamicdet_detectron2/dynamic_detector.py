"""A stock Detectron2 detector, twice or more, with a choice in between.

Letters, as in the paper (DynamicDet, arXiv 2304.05552):

* N: images in a batch. x: images, (N, 3, H, W), normalized and padded.
* ``f1``, ``f2``: maps of the first and second backbone, tuples of (N, C_i, H_i, W_i), one per
  stage.
* ``phi``: difficulty, (N,), in [0, 1], large is hard.
* K: exits. Exit 0 is the first backbone with its branch (pyramid and heads), exit 1 the second with
  its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from dynamicdet.cascade.batch_state import BatchState
from dynamicdet.cascade.calibration_state import CalibrationState
from dynamicdet.cascade.resolution import Ratio, exit_scales, reduce_images
from dynamicdet.cascade.weights import is_plain, rename_entries
from dynamicdet.errors import UsageError
from dynamicdet.exchange.origin import require_detectron2
from dynamicdet.precision import KeepsTypeOfBuffers
from dynamicdet.routing import GAINS, build_objective
from dynamicdet.routing.budget import Budget
from dynamicdet.routing.router import Router
from dynamicdet.routing.thresholds import require_exits

from .branch import ExitImages, ExitInputs, split_detector, stock_images
from .composite import build_composite
from .resolution import reduce_inputs, reduced_size
from .router_training import RouterTraining


class Sample(NamedTuple):
    """An image of a batch: its row, its inputs, and its height and width without padding."""

    row: int
    inputs: dict[str, Any]
    size: tuple[int, int]


@META_ARCH_REGISTRY.register()
class DynamicDetector(KeepsTypeOfBuffers, RouterTraining, CalibrationState, nn.Module):
    """Make any Detectron2 meta-architecture dynamic that sees images through its ``backbone``.

    Trained in two steps: first the cascade (both exits, ``train_router=False``), then the router
    alone (``train_router=True``). Used at any speed: see ``budget``.

    Args:
        detector (Callable or Mapping): Builds the stock detector, anew at each call. A mapping has
            a LazyConfig of it under ``stock``, see `lazy.make_dynamic`.
        shared (bool): Whether all exits use one pyramid and one set of heads, as the paper's
            two-stage detectors do. Defaults to True.
        backbones (int): How many, each fed by the one before, with an exit behind each; 1 to 4. 1
            makes two exits of one backbone that differ by resolution alone, and takes
            ``first_scale`` below 1. Defaults to 2, the paper's.
        reuse_stages (int): Leading stages that later backbones take over from the first. 0 where
            exits differ in scale. Defaults to 1.
        first_scale (float): How large exit 0 sees the image, as a share of its delivered sides, in
            (0, 1]. Defaults to 1.
        scales (Sequence[float], optional): The same of each exit, in place of ``first_scale``.
        router (Mapping): Settings of `Router`: ``reduction``, ``pools``. Defaults to the paper's.
        train_router (bool): Whether this is step 2. Then nothing but the router can change.
            Defaults to False.
        objective (str or Mapping): What the router learns in step 2: a key of
            `dynamicdet.routing.OBJECTIVES`, or ``dict(type=key, ...)``. Defaults to 'paper'.
        budget (Mapping, optional): The wanted speed: one of ``threshold`` in [-1, 1],
            ``hard_share`` in [0, 1], ``target_latency`` in seconds, ``target_gflops``; the last
            three need a calibrated checkpoint. Defaults to the checkpoint's threshold.

    Raises:
        UsageError: If these do not fit together, or the detector cannot be made dynamic.
    """

    @configurable
    def __init__(
        self,
        *,
        detector: Callable[[], nn.Module] | Mapping[str, Any],
        shared: bool = True,
        backbones: int = 2,
        reuse_stages: int = 1,
        first_scale: float = 1.0,
        scales: Sequence[float] | None = None,
        router: Mapping[str, Any] = {},
        train_router: bool = False,
        objective: str | Mapping[str, Any] = 'paper',
        budget: Mapping[str, float] | None = None,
    ) -> None:
        objective = build_objective(objective)
        if train_router and GAINS[objective.gain].values == 'reward':
            raise UsageError("gain 'reward' is of a whole set, not of batches: take 'loss_sum'")
        single = backbones == 1
        scales = exit_scales(max(2, backbones), first_scale, scales and list(scales), single)
        if not single and min(scales) < 1 and reuse_stages:
            raise UsageError(
                'first_scale must be 1, or below 1 with REUSE_STAGES 0, since the second backbone '
                f'then needs its own stem; got {scales[0]} with REUSE_STAGES {reuse_stages}'
            )
        if single and len(set(scales)) < len(scales):
            raise UsageError(
                'one backbone has two exits only where they differ by resolution: give FIRST_SCALE '
                'below 1, or two backbones'
            )
        budget = Budget.parse(budget)
        if budget is not None:
            require_exits(budget, len(scales))
        super().__init__()
        self.num_exits = len(scales)
        #: How large each exit sees the image, as a share of its delivered sides.
        self.scales, self.first_scale = scales, scales[0]
        if isinstance(detector, Mapping):
            stock = detector['stock']
            detector = lambda: instantiate(stock)
        branches, nets = [], []
        #: What names of the backbone begin with in a plain detector's checkpoints.
        self.plain_prefix = ''
        for _ in range(backbones):
            branch, net, self.plain_prefix = split_detector(detector)
            branches.append(branch)
            nets.append(net)
        while not shared and len(branches) < self.num_exits:
            branches.append(split_detector(detector)[0])
        self.backbone = build_composite(nets, 0 if single else reuse_stages)
        self.branches = nn.ModuleList(branches[: 1 if shared else self.num_exits])
        self.router = Router(self.backbone.channels, **router)
        #: Of the deepest map: all but a few detectors have 32; those with more pad to it.
        self.stride = max(32, self.branches[0].backbone.size_divisibility)
        #: Whether the weights that were loaded last are a trained cascade's.
        self.has_cascade = False
        self.train_router = train_router
        # No regions are looked at again here.
        self.regions = None
        self._init_router_learning(objective)
        self._init_calibration(budget)
        # Each step trains its own part. Here and not in a hook: the optimizer and DDP look at
        # `requires_grad` before any hook runs.
        for name, parameter in self.named_parameters():
            parameter.requires_grad &= name.startswith('router.') == train_router

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        """Arguments from a yaml config, see `config.add_dynamicdet_config`."""
        dynamic = cfg.MODEL.DYNAMIC
        name = dynamic.META_ARCHITECTURE
        if name not in META_ARCH_REGISTRY or name == cls.__name__:
            raise UsageError(
                f"MODEL.DYNAMIC.META_ARCHITECTURE names the stock detector; '{name}' is none: take "
                'one such as GeneralizedRCNN, RetinaNet or PanopticFPN'
            )
        return dict(
            detector=lambda: META_ARCH_REGISTRY.get(name)(cfg),
            shared=dynamic.SHARED,
            backbones=dynamic.BACKBONES,
            reuse_stages=dynamic.REUSE_STAGES,
            first_scale=dynamic.FIRST_SCALE,
            scales=dynamic.SCALES or None,
            router=dict(reduction=dynamic.ROUTER.REDUCTION, pools=tuple(dynamic.ROUTER.POOLS)),
            train_router=dynamic.TRAIN_ROUTER,
            objective={name.lower(): value for name, value in dynamic.OBJECTIVE.items()},
            budget={name.lower(): value for name, value in dynamic.BUDGET.items()},
        )

    def train(self, mode: bool = True) -> 'DynamicDetector':
        """In step 2 all but the router stays in eval mode, whatever a loop asks for."""
        super().train(mode)
        if self.train_router:
            for name, module in self.named_children():
                if name != 'router':
                    module.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.threshold.device

    @property
    def needs_step_one(self) -> bool:
        """Whether plain weights leave something of the exits to train: connections between
        backbones."""
        return len(self.backbone.names) > 1

    # Loading.

    def spread_plain_weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the entries of a plain detector's checkpoint to those of all exits.

        A dynamic detector's own checkpoint comes back as it is. Entries that match nothing keep
        their name, so that whoever loads names them.
        """
        if not is_plain(state_dict):
            return dict(state_dict)
        known, spread = set(self.state_dict()), {}
        for key, value in state_dict.items():
            if key.startswith(self.plain_prefix):
                rest = key[len(self.plain_prefix) :]
                targets = [f'backbone.{name}.{rest}' for name in self.backbone.names]
            else:
                targets = [f'branches.{index}.{key}' for index in range(len(self.branches))]
            spread.update({name: value for name in targets if name in known} or {key: value})
        return spread

    def as_plain(self) -> dict[str, Tensor]:
        """The entries of exit 0 under the names that a plain detector's have."""
        plain = {}
        for key, value in self.state_dict().items():
            for ours, theirs in (('backbone.first.', self.plain_prefix), ('branches.0.', '')):
                if key.startswith(ours):
                    plain[theirs + key[len(ours) :]] = value
        return plain

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Take checkpoints of plain detectors, for all exits, and calibrations of any length."""
        require_detectron2(state_dict)
        self.has_cascade = not self.needs_step_one or any(
            key.startswith(f'{prefix}backbone.connections.') for key in state_dict
        )
        entries = rename_entries(state_dict, prefix, self.spread_plain_weights)
        if 'difficulties' in entries:
            self.difficulties = self.difficulties.new_empty(entries['difficulties'].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._scaling = list(zip(self.platt_scale.tolist(), self.platt_shift.tolist()))
        self._apply_budget()

    def forget_calibration(self) -> None:
        """Forget what a new router makes stale: delta, difficulties, costs, the threshold."""
        self.delta.fill_(float('nan'))
        self.difficulties = self.difficulties[:0]
        self.latencies.fill_(float('nan'))
        self.gflops.fill_(float('nan'))
        self.threshold.fill_(0.5)

    # What each exit sees.

    def branch(self, exit: int) -> nn.Module:
        """Pyramid and heads of an exit, 0 to K - 1."""
        return self.branches[min(exit, len(self.branches) - 1)]

    def preprocess(self, batched_inputs: Sequence[dict]) -> ImageList:
        """A batch as the stock detector normalizes and pads it."""
        return stock_images(self.branches[0], batched_inputs)

    def exit_images(self, exit: int, images: Tensor) -> tuple[Tensor, Ratio]:
        """A batch, (N, 3, H, W), as large as an exit sees it, and how large that is."""
        return reduce_images(images, self.scales[exit], self.stride)

    def first_maps(self, images: ImageList) -> tuple[tuple[Tensor, ...], Ratio]:
        """``f1``, and how large the images were that it was made from."""
        seen, ratio = self.exit_images(0, images.tensor)
        return self.backbone.first_maps(seen), ratio

    def deeper_maps(
        self, exit: int, images: Tensor | None, maps: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Ratio]:
        """The maps of an exit from 1 on, from those of the exit before, and how large the images
        were."""
        ratio = (1.0, 1.0)
        if images is not None:
            images, ratio = self.exit_images(exit, images)
        if len(self.backbone.names) == 1:
            return self.backbone.first_maps(images), ratio
        return self.backbone.deeper_maps(images, maps, exit), ratio

    def valid_shares(self, images: ImageList) -> list[tuple[float, float]]:
        """Shares of each image's height and width in the batch that are not padding."""
        height, width = images.tensor.shape[-2:]
        return [(size[0] / height, size[1] / width) for size in images.image_sizes]

    def exit_inputs(
        self, exit: int, samples: Sequence[Sample], maps: tuple[Tensor, ...], ratio: Ratio
    ) -> ExitInputs:
        """What the branch of an exit is called with."""
        whole = hasattr(self.branch(exit), 'sem_seg_head')
        images = ExitImages(
            self.backbone.select(maps),
            [reduced_size(sample.size, ratio, whole) for sample in samples],
        )
        return ExitInputs(
            [reduce_inputs(sample.inputs, sample.size, ratio) for sample in samples], images
        )

    def input_shape(self, exit: int, images: ExitImages) -> tuple[int, int]:
        """Height and width of the padded images that an exit's maps were made from."""
        shapes = self.branch(exit).backbone
        shapes = getattr(shapes, 'bottom_up', shapes).output_shape()
        name, values = next(iter(images.tensor.items()))
        return tuple(side * shapes[name].stride for side in values.shape[-2:])

    def all_exits(
        self,
        batched_inputs: Sequence[dict],
        images: ImageList,
        maps: tuple[Tensor, ...],
        ratio: Ratio,
    ) -> list[tuple[ExitInputs, Ratio]]:
        """What the branch of each exit is called with, and how large the exit sees the batch;
        ``maps`` and ``ratio`` are those of `first_maps`."""
        samples = _samples(batched_inputs, images)
        pixels = images.tensor if self.backbone.needs_images else None
        every = [(self.exit_inputs(0, samples, maps, ratio), ratio)]
        for exit in range(1, self.num_exits):
            maps, ratio = self.deeper_maps(exit, pixels, maps)
            every.append((self.exit_inputs(exit, samples, maps, ratio), ratio))
        return every

    # Forward.

    def forward(self, batched_inputs: Sequence[dict]) -> list[dict[str, Any]] | dict[str, Tensor]:
        """As Detectron2's meta-architectures.

        Args:
            batched_inputs (Sequence[dict]): Of each image, as the stock detector takes it.

        Returns:
            In training the losses: of step 1 all exits' own, named ``exit0.*``, ``exit1.*``, ...;
            of step 2 ``loss_router``. Else what `inference` returns.
        """
        if not self.training:
            return self.inference(batched_inputs)
        if self.train_router:
            return self._step_two(batched_inputs)
        images = self.preprocess(batched_inputs)
        losses = {}
        every = self.all_exits(batched_inputs, images, *self.first_maps(images))
        for exit, (inputs, _) in enumerate(every):
            with get_event_storage().name_scope(f'exit{exit}'):
                exit_losses = self.branch(exit)(inputs)
            losses.update({f'exit{exit}.{name}': value for name, value in exit_losses.items()})
        return losses

    def inference(self, batched_inputs: Sequence[dict]) -> list[dict[str, Any]]:
        """Detect; each image leaves at the exit that its difficulty says.

        Args:
            batched_inputs (Sequence[dict]): N images.

        Returns:
            list[dict]: In input order, what the stock detector gives of each image, with
            ``difficulty`` (float) and ``exit`` (0 to K - 1).
        """
        results: list = [None] * len(batched_inputs)
        state = self.start(batched_inputs)
        while True:
            leaving, going_on = state.split()
            if len(leaving):
                for sample, result in zip(leaving.samples, self.finish(leaving)):
                    results[sample.row] = result
            if not len(going_on):
                return results
            state = self.deepen(going_on)

    def start(self, batched_inputs: Sequence[dict]) -> BatchState:
        """Run the first backbone and the router: all that is known before the first exit. Between
        this, ``finish`` and ``deepen`` images may wait, part and join others."""
        if self._budget_waits:
            self.set_budget(self.budget)
        images = self.preprocess(batched_inputs)
        maps, ratio = self.first_maps(images)
        phi = self.router(maps, self.valid_shares(images))
        # One transfer from the device for both.
        difficulties, exits = torch.stack([phi, self._exits_of(phi).float()]).tolist()
        return BatchState(
            exit=0,
            images=images.tensor if self.backbone.needs_images else None,
            maps=maps,
            ratio=ratio,
            samples=_samples(batched_inputs, images),
            difficulties=difficulties,
            exits=[int(exit) for exit in exits],
        )

    def finish(self, state: BatchState) -> list[dict[str, Any]]:
        """Run this exit's pyramid and heads on all images of a batch state: their results."""
        inputs = self.exit_inputs(state.exit, state.samples, state.maps, state.ratio)
        results = self.branch(state.exit)(inputs)
        for result, difficulty in zip(results, state.difficulties):
            result.update(difficulty=difficulty, exit=state.exit)
        return results

    def deepen(self, state: BatchState) -> BatchState:
        """Run the next backbone on images that go on."""
        maps, ratio = self.deeper_maps(state.exit + 1, state.images, state.maps)
        return replace(state, exit=state.exit + 1, maps=maps, ratio=ratio)


def _samples(batched_inputs: Sequence[dict], images: ImageList) -> list[Sample]:
    rows = enumerate(zip(batched_inputs, images.image_sizes))
    return [Sample(row, inputs, tuple(map(int, size))) for row, (inputs, size) in rows]
