"""Parts of a detector that are compressed together: blocks, and the layers that they hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from ..errors import UsageError

SCORES = ('magnitude', 'random', 'activation', 'gradient')
SCOPES = ('block', 'layer', 'kind')
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class LayerSelection(Protocol):
    """What chooses layers: patterns of module names, under a name for messages."""

    name: str
    modules: Sequence[str]
    exclude: Sequence[str]


def require_patterns(block: LayerSelection) -> None:
    """Raise a `UsageError` where patterns are no list of them."""
    for patterns, what in ((block.modules, 'modules'), (block.exclude, 'exclude')):
        if isinstance(patterns, str):
            raise UsageError(f"block '{block.name}': {what} is a list of patterns, not one string")


@dataclass(frozen=True)
class PruningBlock:
    """What is pruned together, how far and by what.

    Args:
        name (str): For messages.
        modules (Sequence[str]): Patterns (`fnmatch`) of module names; what is below a module that
            matches belongs to it, so ``backbone`` is all of the backbone.
        target (float): Share of the block's weights to prune, in [0, 1). Of whole channels where
            ``structured``.
        exclude (Sequence[str]): Patterns of modules that stay as they are.
        score (str): What makes a weight worth keeping. ``magnitude``: its absolute value.
            ``random``. ``activation``: mean absolute output of a channel; for single weights
            magnitude times root mean square of their input (Sun et al. 2023, Wanda). ``gradient``:
            first-order Taylor, the squared change of the loss without it (Molchanov et al. 2019,
            eq. 8; for channels eq. 9).
        structured (bool): Whole output channels instead of single weights.
        over (str): Who competes: all weights of the ``block``, those of a ``layer``, or those of
            layers of one ``kind`` in the block (convolutions, linear layers).
        norm (float): The n of the Ln norm that ranks channels by magnitude.
    """

    name: str
    modules: Sequence[str]
    target: float
    exclude: Sequence[str] = field(default=())
    score: str = 'magnitude'
    structured: bool = False
    over: str = 'block'
    norm: float = 2

    def __post_init__(self) -> None:
        if not isinstance(self.target, (int, float)) or not 0 <= self.target < 1:
            raise UsageError(
                f"block '{self.name}': its target is {self.target}; it must be at least 0 and "
                'below 1'
            )
        # Not `norm <= 0`, which lets NaN pass.
        if not isinstance(self.norm, (int, float)) or not self.norm > 0:
            raise UsageError(
                f"block '{self.name}': the n of an Ln norm is above 0; got {self.norm}"
            )
        for value, known, what in ((self.score, SCORES, 'score'), (self.over, SCOPES, 'over')):
            if value not in known:
                raise UsageError(
                    f"block '{self.name}': {what}='{value}' is none of {', '.join(known)}"
                )
        require_patterns(self)
        if not self.modules:
            raise UsageError(f"block '{self.name}' names no modules")


@dataclass(frozen=True)
class PrunableLayer:
    """A module with a weight to prune. ``name`` is its first name, ``names`` are all that it goes
    by."""

    name: str
    names: tuple[str, ...]
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that is pruned, (out, in / groups, ...)."""
        return self.module.weight

    @property
    def dim(self) -> int:
        """The weight's dimension of output channels."""
        return 1 if isinstance(self.module, _TRANSPOSED) else 0


def find_layers(model: nn.Module) -> dict[str, PrunableLayer]:
    """All layers with a weight of two or more dimensions: convolutions of all sorts and linear
    layers.

    A weight that is held under several names (as RTMDet's heads do) is one layer.

    Returns:
        dict: First name -> `PrunableLayer`, in the model's order.
    """
    modules: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, 'weight', None)
        grouped_transposed = isinstance(module, _TRANSPOSED) and module.groups > 1
        if (
            isinstance(weight, nn.Parameter)
            and weight.dim() >= 2
            and weight.is_floating_point()
            and not isinstance(module, nn.Embedding)
            and not grouped_transposed
        ):
            modules.setdefault(id(weight), (module, []))[1].append(name)
    return {
        names[0]: PrunableLayer(names[0], tuple(names), module)
        for module, names in modules.values()
    }


def matches_patterns(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module, or one that it is part of, matches one of the patterns."""
    parts = name.split('.')
    above = ['.'.join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in above)


def selected_layers(model: nn.Module, block: LayerSelection) -> dict[str, PrunableLayer]:
    """The layers of a block, in the model's order.

    Raises:
        UsageError: If a pattern matches no layer of the model, or ``exclude`` leaves none.
    """
    every = find_layers(model)
    for pattern in (*block.modules, *block.exclude):
        if not any(
            matches_patterns(name, [pattern]) for layer in every.values() for name in layer.names
        ):
            parts = ', '.join(dict.fromkeys(name.split('.')[0] for name in every))
            raise UsageError(
                f"block '{block.name}': the pattern '{pattern}' matches no module with weights; "
                f'the model has {parts}'
            )
    kept = {
        name: layer
        for name, layer in every.items()
        if any(matches_patterns(alias, block.modules) for alias in layer.names)
        and not any(matches_patterns(alias, block.exclude) for alias in layer.names)
    }
    if not kept:
        raise UsageError(f"block '{block.name}': exclude={list(block.exclude)} leaves no layer")
    return kept


def disjoint_layers(
    model: nn.Module, blocks: Sequence[LayerSelection]
) -> list[dict[str, PrunableLayer]]:
    """The layers of each block, which must not overlap.

    Raises:
        UsageError: If they do, or `selected_layers` does.
    """
    owner: dict[str, str] = {}
    layers_by_block = [selected_layers(model, block) for block in blocks]
    for block, layers in zip(blocks, layers_by_block):
        for name in layers:
            if name in owner:
                raise UsageError(
                    f"'{name}' is in two blocks, '{owner[name]}' and '{block.name}'; exclude it "
                    'from one'
                )
            owner[name] = block.name
    return layers_by_block


def count_units(layer: PrunableLayer, block: PruningBlock) -> int:
    """How many weights a layer has, or channels where whole ones are pruned."""
    return layer.weight.shape[layer.dim] if block.structured else layer.weight.numel()
