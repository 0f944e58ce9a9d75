"""Shares, means and intervals that the report computes from arrays, in NumPy."""

import numpy as np


def lift_share(win_rate: float, ideal: float | None) -> float | None:
    """(W − ½) / (W_ideal − ½), or None where the ideal is unknown or lifts nothing."""
    if ideal is None or abs(ideal - 0.5) < 1e-6:
        return None
    return (win_rate - 0.5) / (ideal - 0.5)


def spread(calibrated: np.ndarray, *, references: int) -> np.ndarray:
    """Calibrated rewards [B, M], each spread over the ranks that it stands for: [B, M, 16].

    They take steps of 1/K, K = `references`, which beat against a histogram's bins: k wins of K stand for the ranks
    from k/(K+1) to (k+1)/(K+1).
    """
    offsets = (np.arange(16) + 0.5) / 16
    return (calibrated[..., None] * references + offsets) / (references + 1)


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving mean over at most `width` steps, fewer at the ends; nan is left out.

    At the start the window shrinks on both sides alike: one that reached further ahead than back would start a curve
    that rises from the reference too high.
    """
    halves = [min(width // 2, index) for index in range(len(values))]
    windows = [values[index - half : index + half + 1] for index, half in enumerate(halves)]
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def highest_mean(values: np.ndarray, width: int) -> float | None:
    """The highest mean of `width` values in a row, or of all where there are fewer; nan is left out, and of nothing
    else it is None."""
    found = values[np.isfinite(values)]
    if not found.size:
        return None
    width = min(width, found.size)
    return float(np.convolve(found, np.full(width, 1 / width), "valid").max())


def binned(where: np.ndarray, values: np.ndarray, *, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of `where` and `values` [B, M] in bins of equal count over `where`, and the half width of 95 % intervals.

    The responses of a prompt are not independent: the interval is that of a ratio of sums over prompts. Ties share
    a bin.
    """
    edges = np.unique(np.quantile(where, np.linspace(0, 1, bins + 1)))
    index = np.clip(np.searchsorted(edges, where, "right") - 1, 0, max(len(edges) - 2, 0))
    prompts = where.shape[0]
    middles, means, halves = [], [], []
    for bin_index in np.unique(index):
        inside = index == bin_index
        count = inside.sum(axis=1)
        total = np.where(inside, values, 0).sum(axis=1)
        mean = total.sum() / count.sum()
        spread = ((total - mean * count) ** 2).sum() * prompts / max(prompts - 1, 1)
        middles.append(where[inside].mean())
        means.append(mean)
        halves.append(1.96 * np.sqrt(spread) / count.sum())
    return np.array(middles), np.array(means), np.array(halves)
