"""Step 2: what images gain by later exits, by which the router learns."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from dynamicdet.cascade.router_learning import RouterLearning
from dynamicdet.routing import GAINS, class_aps, image_aps

from .branch import ExitImages, ExitInputs
from .paired_losses import ExitView, padded_labels, paired_losses


class RouterTraining(RouterLearning):
    """Losses and AP of each image under each exit, gains, and the router's loss. A part of
    `DynamicDetector`."""

    @torch.no_grad()
    def exit_losses(self, batched_inputs: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """Loss of each image under each exit, as batch 1 gives it, without gradient.

        The backbones run once, on the batch; necks and heads per image, since heads average over
        the batch.

        Returns:
            tuple[Tensor, Tensor]: Losses, (K, N), and what the router sees, (N, d); float32.
        """
        every, features = self._all_exits_and_features(batched_inputs)
        losses = [
            [
                sum(value.float() for value in losses.values())
                for losses in paired_losses(
                    [self._image_view(exit, row, *every[exit]) for exit in range(self.num_exits)]
                )
            ]
            for row in range(len(batched_inputs))
        ]
        return torch.stack([torch.stack(pair) for pair in losses], dim=1), features

    def _image_view(self, exit: int, row: int, inputs: ExitInputs, ratio) -> ExitView:
        """An exit's view of one image of a batch."""
        images, branch = inputs.images, self.branch(exit)
        maps = {name: values[row : row + 1] for name, values in images.tensor.items()}
        image = inputs[row]
        if 'sem_seg' in image and hasattr(branch, 'sem_seg_head'):
            ignored = branch.sem_seg_head.ignore_value
            image = padded_labels(image, self.input_shape(exit, images), ignored)
        one_image = ExitImages(maps, images.image_sizes[row : row + 1])
        return ExitView(branch, ExitInputs([image], one_image), ratio)

    @torch.no_grad()
    def exit_gains(self, batched_inputs: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """What each image gains by the last exit, as the objective counts it, without gradient.

        Returns:
            tuple[Tensor, Tensor]: Gains, (N,), and what the router sees, (N, d); float32.
        """
        if self.objective.by_class:
            parts, counts, features = self.class_gains(batched_inputs)
            self.last_class_counts = counts.sum(0)
            return self.weighted_gains(parts), features
        objects = [len(image['instances']) for image in batched_inputs]
        measure = self.exit_losses
        if GAINS[self.objective.gain].values == 'ap':
            measure = self._exit_aps
        values, features = measure(batched_inputs)
        return self.objective.gains(values, objects), features

    @torch.no_grad()
    def class_gains(self, batched_inputs: Sequence[dict]) -> tuple[Tensor, Tensor, Tensor]:
        """What each image gains by the last exit, class by class, to be weighted by class: an
        image's loss goes to its objects in equal parts; its AP is one of each class.

        Returns:
            tuple[Tensor, Tensor, Tensor]: Parts of the gain, (N, C + 1), the last of which is the
                gain of images without objects; objects, (N, C); and what the router sees, (N, d).
        """
        labels = [image['instances'].gt_classes for image in batched_inputs]
        classes = max((int(known.max()) + 1 for known in labels if len(known)), default=0)
        counts = torch.stack([torch.bincount(known, minlength=classes) for known in labels])
        counts = counts.float().to(self.device)
        if GAINS[self.objective.gain].values == 'ap':
            values, features = self._exit_aps(batched_inputs, classes)
            return F.pad(values[-1] - values[0], (0, 1)), counts, features
        losses, features = self.exit_losses(batched_inputs)
        objects = counts.sum(1)
        gains = self.objective.gains(losses, objects.tolist())[:, None]
        shares = torch.cat([counts / objects.clamp(min=1)[:, None], (objects == 0)[:, None]], 1)
        return gains * shares, counts, features

    def _exit_aps(
        self, batched_inputs: Sequence[dict], classes: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """AP of each image by itself under each exit, (K, N), percent, and what the router sees;
        with a number of classes `class_aps`, (K, N, C), instead."""
        # Results in the frame of the annotations.
        inputs = [
            {**image, 'height': image['image'].shape[-2], 'width': image['image'].shape[-1]}
            for image in batched_inputs
        ]
        every, features = self._all_exits_and_features(inputs)
        detections = [
            [_as_arrays(result['instances']) for result in self.branch(exit)(exit_inputs)]
            for exit, (exit_inputs, _) in enumerate(every)
        ]
        truths = [[_annotations(image['instances']) for image in inputs]] * self.num_exits
        aps = (
            image_aps(detections, truths)
            if classes is None
            else class_aps(detections, truths, classes)
        )
        return features.new_tensor(aps), features

    def _all_exits_and_features(self, batched_inputs: Sequence[dict]) -> tuple[list, Tensor]:
        """What each exit sees, as `all_exits` gives it, and what the router does, (N, d)."""
        images = self.preprocess(batched_inputs)
        maps, ratio = self.first_maps(images)
        features = self.router.pool(maps, self.valid_shares(images))
        return self.all_exits(batched_inputs, images, maps, ratio), features

    def _step_two(self, batched_inputs: Sequence[dict]) -> dict[str, Tensor]:
        """What step 2 minimizes; the rest goes to the log, since Detectron2's trainers minimize the
        sum of all that they are given."""
        gains, features = self.exit_gains(batched_inputs)
        # Kept for the hook that tracks their distribution online.
        self.last_gains = gains
        losses = self.router_losses(gains, features)
        get_event_storage().put_scalars(
            **{f'router/{name}': float(value) for name, value in losses.items() if name != _LOSS}
        )
        return {_LOSS: losses[_LOSS]}


_LOSS = 'loss_router'


def _as_arrays(instances: Instances) -> dict[str, np.ndarray]:
    """Boxes, labels and scores of an image, as `image_aps` takes them."""
    instances = instances.to('cpu')
    return dict(
        bboxes=instances.pred_boxes.tensor.numpy(),
        labels=instances.pred_classes.numpy(),
        scores=instances.scores.numpy(),
    )


def _annotations(instances: Instances) -> dict[str, np.ndarray]:
    """What an image holds, as `image_aps` takes it. Detectron2's mappers leave crowds out."""
    instances = instances.to('cpu')
    return dict(
        bboxes=instances.gt_boxes.tensor.numpy(),
        labels=instances.gt_classes.numpy(),
        crowds=np.zeros(len(instances), bool),
    )
