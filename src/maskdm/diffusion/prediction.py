"""What a network may predict, and the exact relations among the answers.

alpha and sigma broadcast against the images. Given x_t, each answer follows from any other:

    eps     the noise
    x0      the clean image
    v       alpha noise - sigma x0, the velocity of Salimans & Ho 2022, Section 4
    flow    noise - x0, the velocity of the straight line (Lipman et al. 2022)
"""

from __future__ import annotations

from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise: the forward process in closed form (Section 2)."""
    return alpha * x0 + sigma * noise


def target_from(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The target of a prediction, of x0's shape. Raises ValueError for an unknown one."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * noise - sigma * x0
    if prediction == "flow":
        return noise - x0
    raise _unknown(prediction)


def x0_and_noise_from(
    prediction: str, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The clean image and the noise that a network's answer implies, given x_t.

    The inverse of `target_from` for any alpha, sigma > 0. Raises ValueError for an unknown
    prediction.
    """
    if prediction == "eps":
        return (x_t - sigma * output) / alpha, output
    if prediction == "x0":
        return output, (x_t - alpha * output) / sigma
    if prediction == "v":
        power = alpha**2 + sigma**2  # 1, except for flows
        return (alpha * x_t - sigma * output) / power, (sigma * x_t + alpha * output) / power
    if prediction == "flow":
        total = alpha + sigma
        return (x_t - sigma * output) / total, (x_t + alpha * output) / total
    raise _unknown(prediction)


def error_scale(prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """By how much an error in x0 grows when the same answer is written as another prediction.

    For a given x_t: alpha / sigma for eps, 1 for x0, (alpha^2 + sigma^2) / sigma for v,
    (alpha + sigma) / sigma for flow. Raises ValueError for an unknown prediction.
    """
    if prediction == "eps":
        return alpha / sigma
    if prediction == "x0":
        return alpha.new_ones(()).expand(alpha.shape)
    if prediction == "v":
        return (alpha**2 + sigma**2) / sigma
    if prediction == "flow":
        return (alpha + sigma) / sigma
    raise _unknown(prediction)


def _unknown(prediction: str) -> ValueError:
    return ValueError(f"unknown prediction {prediction!r}: known: eps, x0, v, flow")
