"""A stock detector with auxiliary heads on its layers, run no further than a frame needs.

Letters: N images, E exits: the auxiliary heads, 0 to E - 2 in the order of their layers, and last
the detector's own output. Exit -1 is before the first: nothing ran but the early layer, and the
stream's last detections are given again, or none.
"""

import copy
from collections.abc import Hashable, Mapping, Sequence

import torch
from mmengine.model import ModuleList
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import OptSampleList, SampleList

from ..cascade.weights import is_plain, rename_entries
from ..errors import UsageError
from ..models.merging import merge_instances
from ..precision import KeepsTypeOfBuffers
from ..routing.box_merging import Merge
from ..routing.budget import Budget
from ..transfers import Followed, take_rows
from .budgets import POINTS, require_early_exit_budget, resolve_budget
from .frames import Frames, last_detections, no_detections, scale_of, to_original
from .gate_inputs import AllExits, Evidence
from .lazy_layers import LazyLayers
from .losses import training_losses
from .part_building import build_gate, build_heads, build_propagation, learned_part
from .propagation import carry_on
from .streams import (
    Streams,
    VideoStream,
    as_frames,
    early_change,
    early_summary,
    is_cut,
    stream_waves,
)

#: What each mode trains: prefixes of parameters. 'joint' trains a gate that learns, too.
TRAINED = dict(
    joint=('detector.', 'heads.', 'propagation.', 'gate.'),
    heads_only=('heads.', 'propagation.'),
    propagation=('propagation.',),
    gate=('gate.',),
)


@MODELS.register_module()
class EarlyExitDetector(KeepsTypeOfBuffers, BaseDetector):
    """Make a detector leave early (Gay 2022).

    The detector's neck offers a table of its layers: ``neck.architecture.layers()`` and
    ``output_layers``, as of YOLOv5 and YOLOv7; its ``bbox_head`` is a dense head of mmdet.

    Args:
        detector (dict): Config of the stock detector.
        heads (dict): ``layers``: positions in the table, ascending (all, if it is not there);
            ``weights``: of each head's losses, one number or one per head (1); the rest is the
            config of each `ExitHead`, in which ``num_classes``, ``anchors`` and settings of losses
            and tests default to the detector's.
        backbone (dict, optional): The detector's; where both are given, this one counts. mmdet's
            ``init_detector`` looks for it.
        mode (str): What is trained: 'joint', all; 'heads_only', on a frozen detector;
            'propagation', alone; 'gate', alone. What is not trained stays in eval mode. Defaults to
            'joint'.
        distillation (dict, optional): Arguments of `distillation.Distillation`: the heads learn
            from the detector's own output, too. Defaults to none.
        propagation (dict, optional): Config of each head's `Propagation`. Defaults to none: frames
            by themselves.
        gate (dict, optional): Config of the gate. Defaults to none: all frames go to the last exit.
        budget (dict, optional): The wanted speed, see `set_budget`. Defaults to the checkpoint's
            thresholds.
        early_layer (int): Position of the layer by which change is told. Defaults to 0, the stem.
        cut (float, optional): A mean change of the early map's parts above it is a cut, see
            `streams.is_cut`: the stream is forgotten. Defaults to none.
        max_streams (int): Streams remembered at a time, beside those of the batch. Defaults to 16.
        merge (str or dict, optional): What a frame finds at the exits before its own joins what it
            finds there, by class, as of `DynamicDetector`; gates look at what is merged. Then all
            heads on the way run. Defaults to none: each exit by itself.
        data_preprocessor (dict, optional): Defaults to the detector's.
        init_cfg (dict, optional): As in mmengine. Defaults to none; the detector's own counts for
            the detector.

    Attributes:
        thresholds (Tensor): (E,), buffer: of exit -1, then of exits 0 to E - 2. A frame leaves at e
            if its difficulty is at most ``thresholds[e + 1]``; at -1 none leaves.
        gflops, latencies (Tensor): (E + 1,), buffers: mean cost of a frame that leaves at -1, 0,
            ..., E - 1, with all heads that the gate looks at on the way. NaN until calibrated.
        operating_points (Tensor): (64, E + 2), buffer: thresholds, mean GFLOPs and mean seconds of
            the best settings on the calibration's videos; NaN rows are unused. See `set_budget`.
    """

    def __init__(
        self,
        detector: dict,
        heads: dict,
        backbone: dict | None = None,
        mode: str = 'joint',
        distillation: dict | None = None,
        propagation: dict | None = None,
        gate: dict | None = None,
        budget: dict | None = None,
        early_layer: int = 0,
        cut: float | None = None,
        max_streams: int = 16,
        merge: str | dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        detector = copy.deepcopy(detector)
        preprocessor = data_preprocessor or detector.get('data_preprocessor')
        super().__init__(copy.deepcopy(preprocessor), init_cfg)
        detector.pop('data_preprocessor', None)
        if backbone:
            detector['backbone'] = copy.deepcopy(backbone)
        self.detector = MODELS.build(detector)
        architecture = getattr(getattr(self.detector, 'neck', None), 'architecture', None)
        if not hasattr(architecture, 'layers'):
            raise UsageError(
                f'{type(self.detector).__name__} offers no table of its layers: an '
                'EarlyExitDetector takes YOLOv5 or YOLOv7, or another whose neck.architecture has '
                'layers()'
            )
        self.table, self.output_layers = architecture.layers(), architecture.output_layers
        if not 0 <= early_layer < len(self.table):
            raise UsageError(
                f'early_layer is a position in a table of {len(self.table)}, got {early_layer}'
            )
        self.exit_layers, self.head_weights, built = build_heads(heads, self.detector, self.table)
        self.heads = ModuleList(built)
        self.num_exits = len(built) + 1
        self.propagation = build_propagation(propagation, built)
        self.gate = build_gate(
            gate,
            [self.table[position].channels for position in self.exit_layers],
            self.table[early_layer].channels,
        )
        self.distillation = distillation
        self.early_layer, self.cut = early_layer, cut
        #: How exits are merged; may be set at any time.
        self.merge: Merge | None = Merge.parse(merge)
        self.mode = mode
        budget = Budget.parse(budget)
        self._check(mode, budget)
        self._streams = Streams(max_streams)
        #: Of the thresholds: the host decides, and would wait for them at every exit.
        self._levels = Followed(Tensor.tolist)
        self.register_buffer('thresholds', torch.full((self.num_exits,), 0.5))
        for name in ('gflops', 'latencies'):
            self.register_buffer(name, torch.full((self.num_exits + 1,), float('nan')))
        self.register_buffer(
            'operating_points', torch.full((POINTS, self.num_exits + 2), float('nan'))
        )
        #: What a gate that is trained before a calibration goes by; see `losses`.
        self.counted_gflops: list[float] | None = None
        self.budget: Budget | None = budget
        self._apply_budget()
        # Here and not in a hook: the optimizer and DDP look at `requires_grad` before any hook
        # runs.
        for name, parameter in self.named_parameters():
            parameter.requires_grad &= name.startswith(TRAINED[mode])

    def _check(self, mode: str, budget: Budget | None) -> None:
        if mode not in TRAINED:
            raise UsageError(f"mode is one of {', '.join(TRAINED)}; got '{mode}'")
        if mode == 'propagation' and self.propagation is None:
            raise UsageError("mode='propagation' needs propagation=dict(type='Propagation')")
        if mode == 'gate' and learned_part(self.gate) is None:
            raise UsageError(
                "mode='gate' needs a gate that learns, such as gate=dict(type='HaltingGate', ...)"
            )
        if budget:
            require_early_exit_budget(budget, self.num_exits)

    def train(self, mode: bool = True) -> 'EarlyExitDetector':
        """What is not trained stays in eval mode, whatever a loop asks for. All streams are
        forgotten."""
        super().train(mode)
        for name, module in self.named_children():
            if name != 'data_preprocessor' and f'{name}.' not in TRAINED[self.mode]:
                module.eval()
        self.reset()
        return self

    def reset(self, video_id: Hashable | None = None) -> None:
        """Forget a stream, or all."""
        self._streams.forget(video_id)

    # Loading.

    def spread_plain_weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the entries of a plain detector's checkpoint to those of the detector inside; one
        of its own comes back as it is."""
        if not is_plain(state_dict) or any(
            key.startswith(('detector.', 'heads.')) for key in state_dict
        ):
            return dict(state_dict)
        known = set(self.state_dict())
        return {
            f'detector.{key}' if f'detector.{key}' in known else key: value
            for key, value in state_dict.items()
        }

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        rename_entries(state_dict, prefix, self.spread_plain_weights)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply_budget()

    # Speed.

    def set_budget(
        self,
        budget: Budget | Mapping[str, float | Sequence[float]] | None = None,
        **named: float | Sequence[float],
    ) -> list[float]:
        """Choose the speed.

        Args:
            budget (Budget or Mapping): A threshold of all exits, or a list of each from -1 to
                E - 2; or mean GFLOPs or seconds per frame, as calibrated. See `Budget.parse`.
            **named: The same by name: ``set_budget(target_gflops=4)``.

        Returns:
            list[float]: The thresholds, (E,).

        Raises:
            UsageError: If out of range, or if the model is not calibrated and needs to be.
        """
        budget = Budget.parse(budget, **named)
        if budget is None:
            raise UsageError('give a budget: threshold, target_gflops or target_latency')
        require_early_exit_budget(budget, self.num_exits)
        thresholds = resolve_budget(budget, self.operating_points, self.num_exits)
        self.thresholds.copy_(torch.tensor(thresholds))
        self.budget, self._budget_waits = budget, False
        return thresholds

    def _apply_budget(self) -> None:
        """Set the thresholds as soon as what the config's budget needs is loaded."""
        self._budget_waits = self.budget is not None
        if self.budget and (
            self.budget.kind == 'threshold' or not self.operating_points.isnan().all()
        ):
            self.set_budget(self.budget)

    # Forward.

    @property
    def decides_early(self) -> bool:
        """Whether the gate also decides before the first exit."""
        return self.gate is not None and self.gate.early

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict[str, Tensor]:
        """Losses of what is trained: ``exitK.*`` of each head, ``final.*`` of the detector's own
        output, those of the gate. Frames of one clip are recognized by ``clip_step``, see
        `streams.clip_numbers`.

        Args:
            batch_inputs (Tensor): (N, 3, H, W), or of clips (B, T, 3, H, W).
            batch_data_samples (list): N ``DetDataSample``, or of clips B ``TrackDataSample``.
        """
        return training_losses(self, *as_frames(batch_inputs, batch_data_samples))

    def extract_feat(self, batch_inputs: Tensor) -> list[Tensor]:
        """What the detector's own head is given."""
        layers = self.lazy(batch_inputs)
        return [layers.take(position) for position in self.output_layers]

    def lazy(self, images: Tensor) -> LazyLayers:
        """The layers of a batch, of which none has run: each exit's and output's map may be taken
        once, and the early layer's."""
        return LazyLayers(
            self.detector,
            self.table,
            images,
            (self.early_layer, *self.exit_layers, *self.output_layers),
        )

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Detect; each frame leaves where the gate says, and nothing behind its exit is computed.

        Args:
            batch_inputs (Tensor): (N, 3, H, W), or of clips (B, T, 3, H, W).
            batch_data_samples (list): N samples, or of clips B. ``video_id`` in the metainfo is the
                stream, ``frame_id`` the place in it; see `Streams`.
            rescale (bool): Whether boxes are in the original image's frame. Defaults to True.

        Returns:
            list: The same samples. Each frame's has ``pred_instances``, ``exit`` (-1 to E - 1) and
            ``difficulty`` (float, as the gate saw it at its last decision; 1 if there was none).
        """
        if self._budget_waits:
            self.set_budget(self.budget)
        inputs, samples = as_frames(batch_inputs, batch_data_samples)
        for images, wave_samples in self._waves(inputs, samples):
            self._predict_wave(images, wave_samples, rescale)
        return batch_data_samples

    @torch.no_grad()
    def predict_all(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> AllExits:
        """All exits of all frames: for evaluation, calibration and the oracle. Samples stay as they
        are.

        Streams are carried on as in `predict`; but each head remembers every frame here, and there
        only those that it ran on.
        """
        inputs, samples = as_frames(batch_inputs, batch_data_samples)
        waves = [
            self._all_of_wave(images, wave_samples, rescale)
            for images, wave_samples in self._waves(inputs, samples)
        ]
        # Back from the order of the waves.
        order = torch.tensor([row for wave in self._wave_rows(samples) for row in wave]).argsort()
        by_exit = [
            [instances for wave in waves for instances in wave.detections[exit]]
            for exit in range(self.num_exits)
        ]
        pooled = [torch.cat(maps)[order] for maps in zip(*(wave.pooled for wave in waves))]
        return AllExits(
            [[instances[row] for row in order.tolist()] for instances in by_exit],
            pooled,
            *(
                torch.cat([getattr(wave, name) for wave in waves])[order]
                for name in ('early', 'change')
            ),
        )

    def _wave_rows(self, samples: SampleList) -> list[list[int]]:
        return stream_waves([sample.metainfo.get('video_id') for sample in samples])

    def _waves(self, inputs: Tensor, samples: SampleList):
        for rows in self._wave_rows(samples):
            images = inputs if len(rows) == len(samples) else take_rows(inputs, rows)
            yield images, [samples[row] for row in rows]

    def _start(self, images: Tensor, samples: SampleList, look: bool) -> Frames:
        """Frames before the first exit; with change and cuts if they are looked at."""
        frames = Frames(
            self.lazy(images),
            samples,
            self._streams.at(samples, images.shape[-2:]),
            [1.0] * len(samples),
        )
        if look:
            frames.early = early_summary(frames.layers.take(self.early_layer))
            known = [
                place for place, stream in enumerate(frames.streams) if stream.early is not None
            ]
            change, cut = (
                frames.early.new_ones(len(samples)),
                frames.early.new_zeros(len(samples), dtype=torch.bool),
            )
            if known:
                current, previous = (
                    take_rows(frames.early, known),
                    torch.stack([frames.streams[place].early for place in known]),
                )
                change = _with_rows(change, known, early_change(current, previous))
                if self.cut is not None:
                    cut = _with_rows(cut, known, is_cut(current, previous, self.cut))
            frames.change, frames.cut = change, cut
        return frames

    def _predict_wave(self, images: Tensor, samples: SampleList, rescale: bool) -> None:
        frames = self._start(images, samples, self.decides_early or self.cut is not None)
        if frames.change is not None:
            frames = self._decide_early(frames, rescale)
        if self._asks or self.merge:
            for exit, layer in enumerate(self.exit_layers):
                if not frames.samples:
                    return
                frames = self._pass(exit, frames, frames.layers.take(layer), rescale)
        if frames.samples:
            self._finish(frames, rescale)

    @property
    def _asks(self) -> bool:
        """Whether the gate is asked at exits: where no threshold lets a frame leave, there is
        nothing to ask; but heads that a gate looks at are run."""
        return self.gate is not None and (
            self.gate.looks_at_detections or max(self._levels(self.thresholds)[1:]) >= 0
        )

    def _pass(self, exit: int, frames: Frames, x: Tensor, rescale: bool) -> Frames:
        """Decide at an exit; those that leave do."""
        looks = self._asks and self.gate.looks_at_detections
        detections = self._found_at(exit, x, frames) if looks or self.merge else None
        if not self._asks:
            return frames
        frames.pooled.append(x.mean(dim=(2, 3), dtype=torch.float32))
        shown = detections if looks else None
        evidence = Evidence(exit, shown, frames.earlier, frames.pooled, None)
        frames.earlier = shown
        return self._decide(frames, evidence, detections, x, rescale)

    def _found_at(self, exit: int, x: Tensor, frames: Frames) -> list[InstanceData]:
        """What a head finds in all frames, in the network's frame; merged with what those before it
        found where that is wanted."""
        detections = self._detect(exit, x, frames.samples, frames.streams)
        if not self.merge:
            return detections
        frames.passed.append(detections)
        return merge_instances(list(zip(*frames.passed)), self.merge)

    def _decide_early(self, frames: Frames, rescale: bool) -> Frames:
        """Before the first exit: let streams begin anew at cuts, and, where the gate decides, those
        frames leave whose difficulty is not above the threshold; the others. All comes to the host
        at once."""
        decisions = [frames.cut]
        if self.decides_early:
            decisions += [
                self.gate.difficulty(Evidence(-1, None, None, [], frames.change)),
                self.gate.sees_nothing(frames.early),
            ]
        cuts, *decided = torch.stack([decision.float() for decision in decisions]).tolist()
        for stream, cut in zip(frames.streams, cuts):
            if cut:
                stream.forget()
        if not decided:
            return frames
        level = self._levels(self.thresholds)[0]
        # Detections of the frame itself, not repeated: of one that changed and shows nothing.
        news = [bool(nothing) and difficulty > level for difficulty, nothing in zip(*decided)]
        frames.difficulties = [
            0.0 if new else difficulty for difficulty, new in zip(decided[0], news)
        ]
        places = [
            place for place, difficulty in enumerate(frames.difficulties) if difficulty <= level
        ]
        for place in places:
            sample, stream, device = (
                frames.samples[place],
                frames.streams[place],
                frames.early.device,
            )
            instances = (
                no_detections(device)
                if news[place]
                else last_detections(stream, sample, rescale, device)
            )
            self._leave(frames, place, -1, instances, rescale, news[place])
        return frames.without(places) if places else frames

    def _decide(
        self,
        frames: Frames,
        evidence: Evidence,
        detections: list[InstanceData] | None,
        x: Tensor,
        rescale: bool,
    ) -> Frames:
        """Let those leave whose difficulty is not above the threshold; the others. The difficulties
        are all that the host waits for. Detections are made unless they were."""
        exit, level = evidence.exit, self._levels(self.thresholds)[evidence.exit + 1]
        frames.difficulties = self.gate.difficulty(evidence).float().tolist()
        places = [
            place for place, difficulty in enumerate(frames.difficulties) if difficulty <= level
        ]
        if not places:
            return frames
        samples, streams = (
            [values[place] for place in places] for values in (frames.samples, frames.streams)
        )
        x = x if len(places) == len(frames.samples) else take_rows(x, places)
        detections = (
            [detections[place] for place in places]
            if detections
            else self._detect(exit, x, samples, streams)
        )
        for place, instances, sample in zip(places, detections, samples):
            self._leave(
                frames,
                place,
                exit,
                to_original(instances, sample) if rescale else instances,
                rescale,
                new=True,
            )
        return frames.without(places)

    def _finish(self, frames: Frames, rescale: bool) -> None:
        """The last exit: the detector's own output."""
        maps = [frames.layers.take(position) for position in self.output_layers]
        detections = self.detector.bbox_head.predict(maps, frames.samples, rescale=rescale)
        if self.merge:
            passed = [
                _in_frame(exit_detections, frames.samples, rescale)
                for exit_detections in frames.passed
            ]
            detections = merge_instances(list(zip(*passed, detections)), self.merge)
        for place, instances in enumerate(detections):
            self._leave(frames, place, self.num_exits - 1, instances, rescale, new=True)

    def _leave(
        self,
        frames: Frames,
        place: int,
        exit: int,
        instances: InstanceData,
        rescale: bool,
        new: bool,
    ) -> None:
        """``new``: what was found is of this frame, and to be remembered."""
        sample, stream = frames.samples[place], frames.streams[place]
        sample.pred_instances = instances
        sample.set_metainfo(dict(exit=exit, difficulty=frames.difficulties[place]))
        if new:
            # A copy: whoever evaluates moves results to where they want them.
            stream.detections, stream.rescaled, stream.scale = (
                instances.clone(),
                rescale,
                scale_of(sample),
            )
            stream.early = None if frames.early is None else frames.early[place]

    def _all_of_wave(self, images: Tensor, samples: SampleList, rescale: bool) -> AllExits:
        frames, detections, pooled = self._start(images, samples, True), [], []
        if self.cut is not None:
            for stream, cut in zip(frames.streams, frames.cut.tolist()):
                if cut:
                    stream.forget()
        for exit, layer in enumerate(self.exit_layers):
            x = frames.layers.take(layer)
            pooled.append(x.mean(dim=(2, 3), dtype=torch.float32))
            instances_by_frame = self._detect(exit, x, samples, frames.streams)
            detections.append(_in_frame(instances_by_frame, samples, rescale))
        maps = [frames.layers.take(position) for position in self.output_layers]
        detections.append(self.detector.bbox_head.predict(maps, samples, rescale=rescale))
        if self.merge:
            images = list(zip(*detections))
            detections = [
                merge_instances([image[: exit + 1] for image in images], self.merge)
                for exit in range(self.num_exits)
            ]
        for stream, early in zip(frames.streams, frames.early):
            stream.early = early
        return AllExits(detections, pooled, frames.early, frames.change)

    def _detect(
        self, exit: int, x: Tensor, samples: SampleList, streams: list[VideoStream]
    ) -> list[InstanceData]:
        """Detections of a head in the network's frame, from its layer's map."""
        features = self.heads[exit].features(x)
        if self.propagation is not None:
            features = carry_on(self.propagation[exit], exit, features, streams)
        return self.heads[exit].predict((features,), samples, rescale=False)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: OptSampleList = None
    ) -> dict[str, list]:
        """Every image through all exits, without memory: ``exits``, the raw outputs of the heads
        and of the detector's own, for FLOPs counters and export."""
        layers = self.lazy(batch_inputs)
        exits = [
            head((head.features(layers.take(position)),))
            for head, position in zip(self.heads, self.exit_layers)
        ]
        maps = [layers.take(position) for position in self.output_layers]
        return dict(exits=[*exits, self.detector.bbox_head(maps)])


def _in_frame(
    detections: Sequence[InstanceData], samples: SampleList, rescale: bool
) -> list[InstanceData]:
    """Detections in the network's frame, in that of the original images where that is wanted."""
    if not rescale:
        return list(detections)
    return [to_original(instances, sample) for instances, sample in zip(detections, samples)]


def _with_rows(values: Tensor, rows: Sequence[int], new: Tensor) -> Tensor:
    """Numbers, (N,), some of which are others."""
    every = list(values.unbind())
    for row, value in zip(rows, new.unbind()):
        every[row] = value
    return torch.stack(every)
