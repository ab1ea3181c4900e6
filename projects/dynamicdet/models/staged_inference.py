"""Inference in stages, between which images may wait, part and join others."""

from dataclasses import replace

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.structures import SampleList

from ..cascade.batch_state import BatchState
from ..routing.detection_features import features as detection_features
from ..routing.merging import scale_scores
from ..routing.record import Detections
from ..transfers import to_host
from .merging import merge_instances
from .resolution import reduce_samples, scale_boxes, valid_shares


class StagedInference:
    """From a batch to detections, exit by exit. A part of `DynamicDetector`."""

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
        return replace(state, difficulties=difficulties, exits=[int(exit) for exit in exits])

    def _first_state(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> tuple[BatchState, Tensor]:
        """A batch before the first exit, not routed yet, and its difficulties, (N,)."""
        maps, ratio = self._first_maps(batch_inputs)
        images = batch_inputs if self._needs_images else None
        state = BatchState(0, images, maps, ratio, batch_data_samples, [], [])
        valid = valid_shares(batch_inputs, batch_data_samples)
        if not self.router.sees_detections:
            return state, self.router(maps, valid)
        self.detect(state, rescale)
        return state, self.router(maps, valid, self._detection_features(state, rescale))

    def _detection_features(self, state: BatchState, rescale: bool) -> Tensor:
        """What the router sees of exit 0's detections, (N, w), boxes in the original frame."""
        arrays = []
        for sample, (boxes, scores, labels) in zip(
            state.samples, to_host([by_exit[0] for by_exit in state.detections])
        ):
            if not rescale:
                boxes = boxes / boxes.new_tensor([*sample.scale_factor] * 2)
            # New: what was found may still be what results are made of.
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
            arrays.append((boxes.numpy(), scores.numpy(), labels.numpy()))
        joined = Detections.join(arrays)
        weights = self.router.class_weights.cpu().numpy()[joined.categories]
        return self.threshold.new_tensor(detection_features(joined, weights), dtype=torch.float32)

    def detect(self, state: BatchState, rescale: bool = True) -> None:
        """Run this exit's neck and heads on the images of a batch state, unless they ran; what they
        find is kept in the state, for this exit and those behind it."""
        if not all(state.exit in by_exit for by_exit in state.detections):
            for by_exit, instances in zip(state.detections, self._run_heads(state, rescale)):
                by_exit[state.exit] = instances

    def finish(self, state: BatchState, rescale: bool = True) -> SampleList:
        """Run this exit's neck and heads on all images of a batch state; results go into the
        samples, merged with those of the exits before where that is wanted."""
        if self.merge or self.regions is not None:
            self.detect(state, rescale)
        if self.merge:
            instances = merge_instances(
                [[by_exit[exit] for exit in sorted(by_exit)] for by_exit in state.detections],
                self.merge,
            )
        elif all(state.exit in by_exit for by_exit in state.detections):
            instances = [by_exit[state.exit] for by_exit in state.detections]
        else:
            instances = self._run_heads(state, rescale)
        for row, (sample, image_instances) in enumerate(zip(state.samples, instances)):
            sample.pred_instances = image_instances
            sample.set_metainfo(dict(difficulty=state.difficulties[row], exit=state.exit))
            if self.regions is not None:
                sample.set_metainfo(
                    dict(regions=self.regions.boxes_of(state.regions[row], sample, state.exit))
                )
        return state.samples

    def deepen(self, state: BatchState, rescale: bool = True) -> BatchState:
        """Run the next backbone on images that go on; where exits are merged, this exit's neck and
        heads before it, unless they ran. Where regions are looked at again, the next exit's, too:
        ``rescale`` is as of `predict`."""
        if any(state.regions):
            return self._look_again(state, rescale)
        if self.merge:
            self.detect(state, rescale)
        maps, ratio = self._deeper_maps(state.exit + 1, state.images, state.maps, state.samples)
        detections = [dict(by_exit) if self.merge else {} for by_exit in state.detections]
        return replace(state, exit=state.exit + 1, maps=maps, ratio=ratio, detections=detections)

    def _run_heads(self, state: BatchState, rescale: bool) -> list[InstanceData]:
        """What the neck and heads of an exit find, its scores scaled; see `predict` for the
        frame."""
        exit, samples, ratio = state.exit, state.samples, state.ratio
        reduced = reduce_samples(samples, ratio) if ratio != (1.0, 1.0) else samples
        predictions = self.branch(exit).predict(
            self.backbone.select(state.maps), reduced, rescale=rescale
        )
        every = [prediction.pred_instances for prediction in predictions]
        for instances in every:
            self._scale_scores(exit, instances)
            if not rescale and ratio != (1.0, 1.0):
                wide, high = ratio
                instances.bboxes = scale_boxes(instances.bboxes, (1 / wide, 1 / high))
        return every

    def _scale_scores(self, exit: int, instances: InstanceData) -> None:
        """Write an exit's scores anew, as comparable with those of others."""
        instances.scores = scale_scores(instances.scores, *self._scaling[exit])
