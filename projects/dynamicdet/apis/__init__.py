from .inferencer import DynamicInferencer
from .visualizer import DynamicVisualizer

__all__ = ['DynamicInferencer', 'DynamicVisualizer']
