from .visualizer import DynamicVisualizer

__all__ = ['DynamicVisualizer']
