"""Power-function averages of the weights: profiles that keep their shape at any training length.

After Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(EDM2), Section 3 and Appendix C.
"""

from __future__ import annotations

import functools


@functools.cache
def gamma_of_width(width: float) -> float:
    """The exponent gamma of the average whose profile tau^gamma has that relative width.

    The width is the standard deviation of the profile over a training of length 1, between 0 and
    sqrt(1/12): width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Eq. 126), solved by bisection,
    as it falls with gamma.
    """
    low, high = 0.0, 1.0
    while _squared_width(high) > width**2:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _squared_width(middle) > width**2 else (low, middle)
    return (low + high) / 2


def _squared_width(gamma: float) -> float:
    return (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))


def inner_product(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Integral over time of the product of two profiles.

    A profile (gamma, end) is (gamma + 1) tau^gamma / end^(gamma + 1) for tau from 0 to `end`
    (Karras et al. 2024, Appendix C.2).
    """
    (a, end_a), (b, end_b) = one, other
    ratio = min(end_a, end_b) / max(end_a, end_b)
    longer = a if end_a > end_b else b  # its profile has only begun where the other ends
    return (a + 1) * (b + 1) / (a + b + 1) * ratio**longer / max(end_a, end_b)
