"""Step 2: what images gain by later exits, by which the router learns."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet.structures import SampleList

from ..cascade.batch_state import BatchState
from ..cascade.resolution import Ratio
from ..cascade.router_learning import RouterLearning
from ..errors import UsageError
from ..routing import GAINS, class_aps, image_aps
from ..routing.region_record import cell_gains_of_detections
from ..transfers import to_host
from .branch import head_types
from .kept_outputs import Outputs
from .merging import merge_instances
from .paired_losses import ExitView, paired_losses
from .resolution import reduce_samples, scale_boxes, valid_shares


class RouterTraining(RouterLearning):
    """Losses and AP of each image under each exit, gains, and the router's loss. A part of
    `DynamicDetector`."""

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
        features = self.router.pool(every[0][0], valid_shares(batch_inputs, batch_data_samples))
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
        every = [
            (state.maps, reduce_samples(state.samples, state.ratio), state.ratio)
            for state in states
        ]
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

    @torch.no_grad()
    def exit_gains(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> tuple[Tensor, Tensor]:
        """What each image gains by the last exit, as the objective counts it, without gradient.

        Returns:
            tuple[Tensor, Tensor]: Gains, (N,), and what the router sees, (N, d), of regions that of
                each cell of all images; float32.
        """
        if self.regions is not None:
            inputs, gains = self.region_gains(batch_inputs, batch_data_samples)
            seen = [image_inputs.flatten(2)[0].T for image_inputs in inputs]
            return torch.stack([gain_map.sum() for gain_map in gains]), torch.cat(seen)
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
        classes = max(
            (int(image_labels.max()) + 1 for image_labels in labels if len(image_labels)), default=0
        )
        counts = torch.stack(
            [torch.bincount(image_labels, minlength=classes) for image_labels in labels]
        ).float()
        if GAINS[self.objective.gain].values == 'ap':
            values, features = self._exit_aps(batch_inputs, batch_data_samples, classes)
            return F.pad(values[-1] - values[0], (0, 1)), counts, features
        losses, features = self.exit_losses(batch_inputs, batch_data_samples)
        objects = counts.sum(1)
        gains = self.objective.gains(losses, objects.tolist())[:, None]
        shares = torch.cat([counts / objects.clamp(min=1)[:, None], (objects == 0)[:, None]], 1)
        return gains * shares, counts, features

    def _exit_aps(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, classes: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """AP of each image by itself under each exit, (K, N), percent, and what the router sees;
        with a number of classes `class_aps`, (K, N, C), instead."""
        every = self._all_exits(batch_inputs, batch_data_samples)
        instances, truths = [], []
        for exit, (maps, samples, _) in enumerate(every):
            # Copies: predictions are written into the samples.
            predictions = self.branch(exit).predict(
                self.backbone.select(maps), reduce_samples(samples, (1.0, 1.0)), rescale=False
            )
            instances.append([sample.pred_instances for sample in predictions])
            truths.append([_annotations(sample) for sample in samples])
        if self.merge:
            # The last exit sees images as delivered.
            instances = self._merged_exits(instances, [ratio for *_, ratio in every])
            truths = truths[-1:] * self.num_exits
        detections = [_as_arrays(exit_instances) for exit_instances in instances]
        features = self.router.pool(every[0][0], valid_shares(batch_inputs, batch_data_samples))
        aps = (
            image_aps(detections, truths)
            if classes is None
            else class_aps(detections, truths, classes)
        )
        return features.new_tensor(aps), features

    def _merged_exits(
        self, instances: list[list[InstanceData]], ratios: Sequence[Ratio]
    ) -> list[list[InstanceData]]:
        """What each exit finds in the delivered frame, that of the exits before merged into it.

        Args:
            instances (list[list[InstanceData]]): By exit and image, in the frame that the exit
                sees.
            ratios (Sequence[Ratio]): How large each exit sees the images.
        """
        for exit, ((wide, high), exit_instances) in enumerate(zip(ratios, instances)):
            for image_instances in exit_instances:
                self._scale_scores(exit, image_instances)
                image_instances.bboxes = scale_boxes(image_instances.bboxes, (1 / wide, 1 / high))
        images = list(zip(*instances))
        return [
            merge_instances([image[: exit + 1] for image in images], self.merge)
            for exit in range(self.num_exits)
        ]

    def _router_losses(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        if self.regions is not None:
            return self._region_router_losses(batch_inputs, batch_data_samples)
        gains, features = self.exit_gains(batch_inputs, batch_data_samples)
        # Kept for the hook that tracks their distribution online.
        self.last_gains = gains
        return self.router_losses(gains, features)

    @torch.no_grad()
    def region_gains(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the router of regions sees of each image, N times (1, width, h, w), and what each
        cell gains by exit 1, N times (h, w), see `routing.region_record.cell_gains`: by what both
        exits find in whole images. Without gradient, float32."""
        every = self._all_exits(batch_inputs, batch_data_samples)
        # Heads write what they find into their samples.
        instances = [
            self._run_heads(
                BatchState(
                    exit, None, maps, ratio, reduce_samples(batch_data_samples, (1, 1)), [], []
                ),
                rescale=False,
            )
            for exit, (maps, _, ratio) in enumerate(every)
        ]
        maps, _, ratio = every[0]
        views = self.regions.router_views(instances[0], batch_data_samples, maps, ratio, False)
        gains = cell_gains_of_detections(
            [_as_arrays(exit_instances) for exit_instances in instances],
            [_annotations(sample) for sample in batch_data_samples],
            [sample.img_shape for sample in batch_data_samples],
            self.regions.class_weights.cpu().numpy(),
            self.regions.cell,
        )
        device = batch_inputs.device
        return (
            [self.regions.router.inputs(*view) for view in views],
            [torch.from_numpy(gain_map).float().to(device) for gain_map in gains],
        )

    def _region_router_losses(
        self, batch_inputs: Tensor, batch_data_samples: SampleList
    ) -> dict[str, Tensor]:
        """Squared error of what each cell gains, summed over an image, in units of the spread of
        the images' gains."""
        inputs, gains = self.region_gains(batch_inputs, batch_data_samples)
        sums = torch.stack([gain_map.sum() for gain_map in gains])
        self.last_gains = sums
        known = sums if self.gains.isnan().any() else self.gains
        spread = known.std(correction=0).clamp(min=1e-6)
        router = self.regions.router
        errors = [
            (router.gains(image_inputs)[0] - gain_map.clamp(-spread, spread)).square().sum()
            for image_inputs, gain_map in zip(inputs, gains)
        ]
        return dict(
            loss_router=torch.stack(errors).mean() / spread.square(),
            gain=sums.mean(),
            delta=known.median(),
        )


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
