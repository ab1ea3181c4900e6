"""Pictures that say how hard an image was."""

import numpy as np
from mmengine.structures import InstanceData

from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer

#: Points. Below 6 the figures cannot be told apart (looked at, 64 to 192 pixels wide).
_SMALLEST_FONT = 6
#: Pixels that 'difficulty 0.46, exit 1' takes in the smallest font, with its frame (measured).
_ONE_LINE = 92


@VISUALIZERS.register_module()
class DynamicVisualizer(DetLocalVisualizer):
    """mmdet's visualizer; predictions that carry ``difficulty`` and ``exit`` show them in the upper
    left corner."""

    _corner: str | None = None

    def add_datasample(
        self,
        name: str,
        image: np.ndarray,
        data_sample: DetDataSample | None = None,
        *args,
        **kwargs,
    ) -> None:
        """As mmdet's, whose other arguments are passed on."""
        self._corner = None
        if data_sample is not None and 'difficulty' in data_sample:
            gap = ', ' if image.shape[1] >= _ONE_LINE else '\n'
            self._corner = f'difficulty {data_sample.difficulty:.2f}{gap}exit {data_sample.exit}'
        super().add_datasample(name, image, data_sample, *args, **kwargs)

    def _draw_instances(
        self,
        image: np.ndarray,
        instances: InstanceData,
        classes: list[str] | None,
        palette: list[tuple] | None,
    ) -> np.ndarray:
        # Here, since mmdet writes the file in `add_datasample` and calls this even where nothing
        # was found.
        drawn = super()._draw_instances(image, instances, classes, palette)
        # Ground truth has no scores.
        if self._corner is None or 'scores' not in instances:
            return drawn
        height, width = image.shape[:2]
        # Less than half of the width, whatever the shape. Opaque: labels of boxes lie below.
        self.draw_texts(
            self._corner,
            np.array([2, 2]),
            colors='white',
            font_sizes=max(_SMALLEST_FONT, min(height // 36, width // 32)),
            bboxes=[dict(facecolor='black', pad=2, edgecolor='none')],
        )
        return self.get_image()
