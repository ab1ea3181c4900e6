"""Data: the built-in sets, checks before a run, mended annotations, seeds, held-out parts."""
