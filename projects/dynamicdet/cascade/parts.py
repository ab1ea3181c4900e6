"""Parts of a detector: what is computed on tensors alone, between a framework's own Python.

A part takes tensors and gives tensors. `DetectorPart.place` puts another computation in its place,
for good: an ONNX graph, or the same in 8 bits. The frameworks say where the heads' parts are; the
backbones' are here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError

#: Tensors -> any nesting of lists and tuples of tensors.
Run = Callable[..., Any]


@dataclass(frozen=True)
class DetectorPart:
    """A part of a detector.

    Attributes:
        name (str): Such as ``first``, ``second`` or ``branch0``.
        run (Callable): Tensors -> nested tensors, as the detector was built.
        place (Callable): Takes what is to be run instead.
        modules (tuple[nn.Module]): All that it computes with.
        spared (tuple[nn.Module]): What of it is never quantized.
        predicts (bool): Whether what it gives are predictions, such as scores and boxes.
    """

    name: str
    run: Run
    place: Callable[[Run], None]
    modules: tuple[nn.Module, ...]
    spared: tuple[nn.Module, ...] = ()
    predicts: bool = False


class Features(tuple):
    """Maps, with what the same part computed from them: a head's outputs or difficulties."""

    outputs: Any = None

    @classmethod
    def of(cls, maps: Sequence[Tensor], outputs: Any) -> 'Features':
        """Maps with what the same part computed from them."""
        features = cls(maps)
        features.outputs = outputs
        return features


def first_part(model: nn.Module) -> DetectorPart:
    """The first backbone and, for images without padding, the router.

    Padding differs from image to image, and is left out by torch.

    Args:
        model (nn.Module): A dynamic detector of any framework: its ``backbone`` and ``router``.
    """
    backbone, router = model.backbone, model.router
    first_maps, score = backbone.first_maps, router.forward

    def run(images: Tensor) -> tuple:
        maps = first_maps(images)
        return maps, score(maps)

    def place(run: Run) -> None:
        backbone.first_maps = lambda images: Features.of(*run(images))
        router.forward = forward

    def forward(
        maps: Sequence[Tensor], valid: Sequence[tuple[float, float]] | None = None
    ) -> Tensor:
        whole = valid is None or all(high == wide == 1 for high, wide in valid)
        if whole and isinstance(maps, Features):
            return maps.outputs
        return score(maps, valid)

    # Its cost is nothing, and who goes on depends on it.
    return DetectorPart('first', run, place, (backbone.first, router), (router,))


def backbone_part(backbone: nn.Module) -> DetectorPart:
    """The first backbone alone, where the router cannot be computed with it."""
    first_maps = backbone.first_maps

    def place(run: Run) -> None:
        backbone.first_maps = run

    return DetectorPart('first', lambda images: tuple(first_maps(images)), place, (backbone.first,))


def deeper_parts(model: nn.Module) -> list[DetectorPart]:
    """Each later backbone, with the connections into it."""
    backbone = model.backbone
    deeper_maps, reused = backbone.deeper_maps, backbone.reuse_stages
    placed: dict[int, Run] = {}

    def place(index: int, run: Run) -> None:
        placed[index] = run
        backbone.deeper_maps = dispatch

    def dispatch(images: Tensor | None, maps: Sequence[Tensor], index: int = 1) -> tuple:
        if index not in placed:
            return deeper_maps(images, maps, index)
        inputs = (*maps, images) if backbone.needs_images else maps
        # What it takes over it need not give back.
        return (*maps[:reused], *placed[index](*inputs))

    def run(index: int, *inputs: Tensor) -> tuple:
        *maps, images = inputs if backbone.needs_images else (*inputs, None)
        return tuple(deeper_maps(images, tuple(maps), index)[reused:])

    return [
        DetectorPart(
            name,
            lambda *inputs, index=index: run(index, *inputs),
            lambda other, index=index: place(index, other),
            (backbone.nets[index], backbone.connections),
        )
        for index, name in enumerate(backbone.names)
        if index
    ]


# Nested tensors, flat, for a graph.

Form = Any


def flatten(value: Any) -> tuple[list[Tensor], Form]:
    """Tensors, each once, and how they are nested: an index, None, or ['list' or 'tuple',
    parts]."""
    tensors: list[Tensor] = []

    def visit(node: Any) -> Form:
        if isinstance(node, Tensor):
            for index, known in enumerate(tensors):
                if known is node:
                    return index
            tensors.append(node)
            return len(tensors) - 1
        if node is None:
            return None
        if isinstance(node, (list, tuple)):
            return ['list' if isinstance(node, list) else 'tuple', [visit(child) for child in node]]
        raise UsageError(
            f'a part gives a {type(node).__name__}, which is no tensor: it cannot be a graph'
        )

    form = visit(value)
    return tensors, form


def unflatten(tensors: Sequence[Tensor], form: Form) -> Any:
    """The opposite of `flatten`."""
    if form is None:
        return None
    if isinstance(form, int):
        return tensors[form]
    parts = [unflatten(tensors, child) for child in form[1]]
    return parts if form[0] == 'list' else tuple(parts)


@torch.no_grad()
def record_inputs(
    parts: Sequence[DetectorPart], drive: Callable[[], None]
) -> dict[str, tuple[Tensor, ...]]:
    """What reaches each part first, while something drives the detector. Parts stay watched."""
    seen: dict[str, tuple[Tensor, ...]] = {}

    def watch(part: DetectorPart) -> None:

        def run(*tensors: Tensor) -> Any:
            seen.setdefault(part.name, tensors)
            return part.run(*tensors)

        part.place(run)

    for part in parts:
        watch(part)
    drive()
    return seen
