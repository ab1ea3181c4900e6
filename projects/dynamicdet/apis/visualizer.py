"""Pictures that say how hard an image was."""
from typing import List, Optional

import numpy as np
from mmengine.structures import InstanceData

from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer


@VISUALIZERS.register_module()
class DynamicVisualizer(DetLocalVisualizer):
    """mmdet's visualizer; predictions that carry ``difficulty`` and ``exit`` show them in the upper
    left corner."""

    _corner: Optional[str] = None

    def add_datasample(self,
                       name: str,
                       image: np.ndarray,
                       data_sample: Optional[DetDataSample] = None,
                       *args,
                       **kwargs) -> None:
        """As mmdet's, whose other arguments are passed on."""
        self._corner = None
        if data_sample is not None and 'difficulty' in data_sample:
            self._corner = f'difficulty {data_sample.difficulty:.2f}, exit {data_sample.exit}'
        super().add_datasample(name, image, data_sample, *args, **kwargs)

    def _draw_instances(self, image: np.ndarray, instances: InstanceData,
                        classes: Optional[List[str]],
                        palette: Optional[List[tuple]]) -> np.ndarray:
        drawn = super()._draw_instances(image, instances, classes, palette)
        # Ground truth has no scores.
        if self._corner is None or 'scores' not in instances:
            return drawn
        self.set_image(drawn)
        self.draw_texts(
            self._corner,
            np.array([2, 2]),
            colors='white',
            font_sizes=max(6, min(image.shape[:2]) // 25),
            bboxes=[dict(facecolor='black', alpha=0.7, pad=1, edgecolor='none')])
        return self.get_image()
