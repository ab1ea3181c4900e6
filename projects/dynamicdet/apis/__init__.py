"""What users import: an inferencer at any speed, and a visualizer."""

from .inferencer import DynamicInferencer
from .visualizer import DynamicVisualizer

__all__ = ['DynamicInferencer', 'DynamicVisualizer']
