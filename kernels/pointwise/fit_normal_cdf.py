"""python kernels/pointwise/fit_normal_cdf.py

Prints the coefficients of GELU "poly" and its largest errors. The CDF of the normal distribution is fitted on [0, CUT] by
1/2 + u Q(u^2), u = a clamped to [-CUT, CUT], exactly 1 at CUT, so that nothing grows beyond it. Lawson's iteration
(C. L. Lawson, 1961: least squares reweighted by the errors) minimises the largest of max(1, a) * error, which is the error
of GELU and of its slope.
"""

import math

import numpy as np

CUT = 4.0
TERMS = 8
POINTS = 1001
ROUNDS = 1000


def normal_cdf(a: np.ndarray) -> np.ndarray:
    """The CDF of the normal distribution in float64."""
    return np.array([0.5 * math.erfc(-x * math.sqrt(0.5)) for x in a.ravel()]).reshape(a.shape)


def fit(cut: float = CUT, terms: int = TERMS) -> np.ndarray:
    """The coefficients of Q, from the highest power down."""
    a = 0.5 * cut * (1 - np.cos(np.linspace(0, math.pi, POINTS)))
    # Q(t) = 1/(2 cut) + (t - cut^2) R(t): R is free and the value at the cut is kept
    basis = (a * (a**2 - cut**2))[:, None] * (a[:, None] / cut) ** (2 * np.arange(terms - 1))
    scale, wanted = np.maximum(a, 1), normal_cdf(a) - 0.5 - 0.5 * a / cut
    weight = np.full(POINTS, 1 / POINTS)
    for _ in range(ROUNDS):
        root = np.sqrt(weight) * scale
        solution = np.linalg.lstsq(root[:, None] * basis, root * wanted, rcond=None)[0]
        weight *= np.abs(basis @ solution - wanted) * scale
        weight /= weight.sum()
    free = (solution / cut ** (2 * np.arange(terms - 1)))[::-1]
    q = np.polymul(free, [1, -(cut**2)])
    q[-1] += 0.5 / cut
    return q


def errors(q: np.ndarray, cut: float = CUT) -> tuple[float, float]:
    """The largest error of GELU and of its slope over [-12, 12], with float32 coefficients."""
    a = np.linspace(-12, 12, 480001)
    u = np.clip(a, -cut, cut)
    error = 0.5 + u * np.polyval(q.astype(np.float32).astype(np.float64), u * u) - normal_cdf(a)
    return np.abs(a * error).max(), np.abs(error).max()


if __name__ == "__main__":
    coefficients = fit()
    print(*(f"{value:.9e}" for value in coefficients), sep="\n")
    print("largest error of GELU {:.2e}, of its slope {:.2e}".format(*errors(coefficients)))
