"""Choose evenly spaced items, for previews, plots and samples of large sets."""

import numpy as np


def make_evenly_spaced_indices(count: int, max_count: int) -> np.ndarray:
    """Return at most `max_count` evenly spaced indices from 0 to `count` - 1, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, max_count)).round().astype(int))
