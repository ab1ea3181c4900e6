"""Smaller detectors: pruning, and files that hold what is left."""
