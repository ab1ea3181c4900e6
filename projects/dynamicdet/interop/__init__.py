"""Checkpoints from elsewhere: one table of rules per source."""

from .convert import SOURCES, convert_checkpoint

__all__ = ['SOURCES', 'convert_checkpoint']
