"""Exact data: Gaussian processes, and what few steps of the exact denoiser make of them."""

import itertools

import numpy as np

from videoar.evaluation.search import Segment


def few_step_error(covariance: np.ndarray, steps: int) -> float:
    """Squared Wasserstein distance from a Gaussian to what few steps make of it.

    The exact denoiser predicts the clean data, which is noised again with fresh noise; all of it is
    diagonal in the basis of the covariance, and the mean is right.
    """
    variance = np.linalg.eigvalsh(covariance).clip(min=0)
    made = np.zeros_like(variance)  # of the first prediction, which knows nothing but the mean
    for sigma in np.linspace(1, 0, steps + 1)[1:-1]:
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        made = gain**2 * ((1 - sigma) ** 2 * made + sigma**2)
    return float(((np.sqrt(variance) - np.sqrt(made)) ** 2).sum())


def gaussian_costs(correlation: list[float], steps: int) -> list[Segment]:
    """Every segment of a process whose frame t has `correlation[t]` with the one before.

    What is before the first frame is known, as it is before every segment.
    """
    found = []
    for start, end in itertools.combinations(range(len(correlation) + 1), 2):
        size = end - start
        mix = np.zeros((size, size))  # frames of the fresh noise of each
        for t in range(size):
            rho = correlation[start + t]
            mix[t] = rho * mix[t - 1] if t else 0
            mix[t, t] = (1 - rho**2) ** 0.5
        cost = few_step_error(mix @ mix.T, steps)
        found.append(Segment(start, f"chunk:{size}", size, 1, cost))
    return found
