"""A detector, layer by layer, no further than asked."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from ..models.yolo import YOLOLayer, concatenate_maps
from ..transfers import take_rows


class LazyLayers:
    """A batch on its way through a table of layers.

    A layer runs when its map, or one that follows from it, is first taken. A map is let go when no
    layer that has not run needs it and nobody is still to take it.

    Args:
        detector (nn.Module): Whose modules the table names.
        table (Sequence[YOLOLayer]): Each layer behind those that it is given.
        images (Tensor): (N, 3, H, W).
        wanted (Sequence[int]): Positions in the table of the maps that will be taken, each as often
            as it is there.
    """

    def __init__(
        self, detector: nn.Module, table: Sequence[YOLOLayer], images: Tensor, wanted: Sequence[int]
    ) -> None:
        self._detector, self._table = detector, table
        self._wanted = Counter(wanted)
        self._maps: dict[int, Tensor] = {-1: images}
        self._done: set[int] = {-1}

    def take(self, position: int) -> Tensor:
        """The map of a layer, (N, C, H', W').

        Raises:
            KeyError: If it is not among the wanted, or was taken as often as that.
        """
        if not self._wanted[position]:
            raise KeyError(f'the map of layer {position} is not kept: it was not named as wanted')
        for index in self._missing(position):
            inputs = self._table[index].inputs or (-1,)
            module = self._detector.get_submodule(self._table[index].name)
            self._maps[index] = module(concatenate_maps([self._maps[source] for source in inputs]))
            self._done.add(index)
            self._let_go(inputs)
        taken = self._maps[position]
        self._wanted[position] -= 1
        self._let_go((position,))
        return taken

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the images alone."""
        self._maps = {
            position: take_rows(feature_map, rows) for position, feature_map in self._maps.items()
        }

    @property
    def held(self) -> list[int]:
        """Positions of the maps that are kept now; -1 is the image."""
        return sorted(self._maps)

    def _missing(self, position: int) -> list[int]:
        """What has to run, in order."""
        missing, waiting = set(), [position]
        while waiting:
            index = waiting.pop()
            if index not in self._done and index not in missing:
                missing.add(index)
                waiting.extend(self._table[index].inputs)
        return sorted(missing)

    def _let_go(self, positions: Sequence[int]) -> None:
        for position in positions:
            if not self._wanted[position] and not any(
                position in (layer.inputs or (-1,))
                for index, layer in enumerate(self._table)
                if index not in self._done
            ):
                self._maps.pop(position, None)
