"""Checkpoints of plain and dynamic detectors, read without being executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor

from dynamicdet.cascade.composite import ORDINALS
from dynamicdet.cascade.weights import fit_weights
from dynamicdet.compression.shrinking import resize_channels
from dynamicdet.errors import UsageError, reason_of
from dynamicdet.exchange.origin import require_detectron2
from dynamicdet.exchange.reading import read_content

from .channel_removal_hook import parameters_followed
from .dynamic_detector import DynamicDetector

#: Ends of names.
_UNNEEDED = ('num_batches_tracked', 'pixel_mean', 'pixel_std')


class DynamicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with three differences: no file is executed, whatever it holds;
    files of plain detectors and backbones, also those whose names are matched by heuristics, fill
    all exits; and weights of another architecture are refused, where Detectron2 would train random
    ones."""

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint, see `DetectionCheckpointer.load`.

        Raises:
            UsageError: If the file cannot be read safely, or is of another architecture.
        """
        if path and '://' not in path and not Path(path.partition('?')[0]).is_file():
            raise UsageError(f"there is no checkpoint at '{path}'")
        self._guesses = 'matching_heuristics=True' in (path or '')
        try:
            return super().load(path, *args, **kwargs)
        except UsageError as error:
            said = str(error)
            raise UsageError(said if path in said else f"'{path}': {said}") from None
        except OSError as error:
            if '://' not in path:
                raise
            raise UsageError(
                f"'{path}' cannot be downloaded: {reason_of(error)}; where there is no network, "
                'give the path of a file that was downloaded elsewhere'
            ) from None
        finally:
            # Of Detectron2's main alone; left over where loading fails.
            if hasattr(self, '_parsed_url_during_load'):
                self._parsed_url_during_load = None

    def require_complete(self, path: str) -> None:
        """Refuse what was loaded last into a plain detector, if some of its layers stayed as they
        were built; Detectron2 names them in its log alone.

        Raises:
            UsageError: If it is so.
        """
        incompatible = getattr(self, '_incompatible', None)
        if incompatible is None:
            return
        shapes = [key for key, *_ in incompatible.incorrect_shapes]
        missing = [key for key in (*incompatible.missing_keys, *shapes) if key.endswith('.weight')]
        if missing:
            raise UsageError(
                f"'{path}' is of another detector than the config says ({len(missing)} layers are "
                f'not in it as they should be, such as {missing[0]})'
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_content(filename)
        if 'model' not in content:
            # Of others; backbones that were trained on ImageNet; Detectron's own.
            content = content.get('state_dict', content.get('blobs', content))
            weights = {key: v for key, v in content.items() if not key.endswith('_momentum')}
            caffe2 = filename.endswith('.pkl')
            content = dict(model=weights, matching_heuristics=caffe2)
            if caffe2:
                content['__author__'] = 'Caffe2'
        content['matching_heuristics'] = content.get('matching_heuristics') or self._guesses
        return content

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a checkpoint, see fvcore's; with what channels the model has lost."""
        channels = getattr(self.model, 'removed_channels', None)
        super().save(name, **(dict(removed_channels=channels) if channels else {}), **kwargs)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        model = self.model
        channels = checkpoint.pop('removed_channels', None) or {}
        if channels != getattr(model, 'removed_channels', {}):
            with parameters_followed(model, self.checkpointables.get('trainer')):
                resize_channels(model, channels)
            model.removed_channels = channels
        if not isinstance(model, DynamicDetector):
            self._incompatible = super()._load_model(checkpoint)
            return self._incompatible
        state = {
            key.removeprefix('module.'): value
            for key, value in checkpoint.pop('model').items()
            if isinstance(value, Tensor)
        }
        if not state:
            raise UsageError('this is no checkpoint: it holds no weights')
        require_detectron2(state)
        guessed = checkpoint.get('matching_heuristics', False)
        if guessed:
            caffe2 = checkpoint.get('__author__') == 'Caffe2'
            state = align_and_update_state_dicts(model.as_plain(), state, c2_conversion=caffe2)
        state = _without_unneeded(model, state)
        known = model.spread_plain_weights(state)
        _require_same_architecture(model, known, guessed)
        fitted, line = fit_weights(model, state)
        self.logger.info(line)
        incompatible = super()._load_model(dict(model=_loadable(model, fitted)))
        # The model's own entries stood in for what is missing.
        model.has_cascade = not model.needs_step_one or any(
            key.startswith('backbone.connections.') for key in known
        )
        return incompatible


def _loadable(model: DynamicDetector, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make room for a calibration, which fvcore would leave out for its length."""
    if 'difficulties' in state:
        model.difficulties = model.difficulties.new_empty(state['difficulties'].shape)
    return state


def _without_unneeded(model: DynamicDetector, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what has no place in a detector and needs none: what counts the batches of norms,
    where norms are frozen; what follows from the config."""
    entries = model.state_dict()
    homeless = {key for key in model.spread_plain_weights(state) if key not in entries}
    return {
        key: value
        for key, value in state.items()
        if key not in homeless
        or not (key.endswith(_UNNEEDED) or 'anchor_generator.cell_anchors' in key)
    }


def _require_same_architecture(
    model: DynamicDetector, state: Mapping[str, Tensor], guessed: bool
) -> None:
    """Refuse weights of another backbone, or of other heads; heads for other classes are
    fine-tuning's own business.

    Args:
        state (Mapping[str, Tensor]): Under the dynamic detector's names, where they are known.
        guessed (bool): Whether names were matched by heuristics: what a backbone's file holds
            beside the backbone, such as a classifier, is then no sign of another detector.
    """
    entries = model.state_dict()
    backbones = (*(f'backbone.{name}.' for name in ORDINALS), model.plain_prefix)
    backbone = [key for key in state if key.startswith(backbones)]
    missing = [
        key
        for key in entries
        if key.startswith('backbone.first.') and _is_weight(key, entries) and key not in state
    ]
    foreign = [
        key for key in backbone if key not in entries or entries[key].shape != state[key].shape
    ]
    homeless = [key for key in state if key not in entries and not key.startswith(backbones)]
    heads = [key for key in entries if key.startswith('branches.0.') and '.backbone.' not in key]
    unfilled = [key for key in heads if key not in state]
    other_heads = not guessed and homeless and 2 * len(unfilled) > len(heads)
    others = (
        ('of another backbone', foreign or missing),
        ('of other heads', homeless if other_heads else []),
    )
    for what, keys in others:
        if keys:
            raise UsageError(
                f'these weights are {what} than the config says ({len(keys)} entries differ, such '
                f'as {keys[0]}): take the file of this architecture, or the config of this file'
            )


def _is_weight(key: str, entries: Mapping[str, Tensor]) -> bool:
    """Whether an entry is of a convolution or linear layer: norms may be stored otherwise."""
    return key.endswith('.weight') and entries[key].ndim > 1
