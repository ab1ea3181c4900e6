"""Data: the built-in set, and what to look at before a run. Neither needs torch."""
