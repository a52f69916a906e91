from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from maskdm.diffusion.objective import loss_weight, masked_denoising_loss
from maskdm.diffusion.schedule import (
    SCHEDULES,
    add_noise,
    make_schedule,
    target_from,
    x0_and_noise_from,
)
from maskdm.recipe import Diffusion

TIMES = torch.arange(1000) / 999
PREDICTIONS = ("eps", "x0", "v")


@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_tables_equal_those_of_diffusers(name, theirs):
    expected = DDPMScheduler(1000, 1e-4, 0.02, theirs).alphas_cumprod.double()
    schedule = make_schedule(name)
    actual = schedule.alpha(TIMES).double() ** 2
    # diffusers accumulates a thousand factors in float32
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_preserve_variance_and_lose_signal(name):
    schedule = make_schedule(name)
    alpha, sigma = schedule.alpha(TIMES).double(), schedule.sigma(TIMES).double()
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000).double(), rtol=1e-6, atol=0)
    log_snr = schedule.log_snr(TIMES)
    torch.testing.assert_close(
        log_snr.double(), 2 * (alpha.log() - sigma.log()), rtol=1e-3, atol=1e-3
    )
    assert (log_snr.diff() < 0).all()


def test_times_are_drawn_from_the_whole_table_evenly():
    t = make_schedule("linear").draw_times(200_000, torch.Generator().manual_seed(0))
    index = (t * 999).round()
    assert torch.allclose(index / 999, t)
    counts = torch.bincount(index.long(), minlength=1000)
    assert counts.min() > 200 - 5 * 200**0.5 and counts.max() < 200 + 5 * 200**0.5


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_noise_come_back_from_any_prediction(prediction):
    x0, noise = torch.randn(2, 5, 3).double()
    for alpha, sigma in [(0.8, 0.6), (0.01, 0.99995), (0.99995, 0.01)]:
        a, s = torch.tensor(alpha).double(), torch.tensor(sigma).double()
        x_t = add_noise(x0, noise, a, s)
        output = target_from(prediction, x0, noise, a, s)
        again_x0, again_noise = x0_and_noise_from(prediction, output, x_t, a, s)
        torch.testing.assert_close((again_x0, again_noise), (x0, noise), rtol=1e-4, atol=1e-2)


def loss_of(model, prediction="eps", weighting="uniform", t=0.3, num=4):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(num, 6, 8, generator=generator) * 2 - 1
    noise = torch.randn(num, 6, 8, generator=generator)
    visible = torch.arange(6).expand(num, 6)
    settings = Diffusion(schedule="linear", prediction=prediction, weighting=weighting)
    schedule = make_schedule("linear")
    times = torch.full((num,), t)
    return masked_denoising_loss(
        model(x0, noise, schedule), x0, visible, times, noise, schedule, settings
    )


def test_the_loss_of_a_silent_network_is_the_noise_energy():
    silent = lambda x0, noise, schedule: lambda x, p, t, y: torch.zeros_like(x)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    torch.rand(4, 6, 8, generator=generator)
    expected = torch.randn(4, 6, 8, generator=generator).square().mean(dim=(1, 2))
    torch.testing.assert_close(loss_of(silent), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_a_perfect_network_is_zero(prediction):
    def perfect(x0, noise, schedule):
        def model(x_t, positions, t, labels):
            alpha, sigma = (f(t)[:, None, None] for f in (schedule.alpha, schedule.sigma))
            torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
            return target_from(prediction, x0, noise, alpha, sigma)

        return model

    assert loss_of(perfect, prediction).max() == 0


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_min_snr_is_one_loss_written_for_three_predictions(t):
    def same_answer(prediction):
        """A network that believes in the image 0, whatever it is asked for."""

        def make(x0, noise, schedule):
            def model(x_t, positions, t, labels):
                alpha, sigma = (f(t)[:, None, None] for f in (schedule.alpha, schedule.sigma))
                guess = torch.zeros_like(x_t)
                return target_from(prediction, guess, (x_t - alpha * guess) / sigma, alpha, sigma)

            return model

        return make

    losses = [loss_of(same_answer(p), p, "min-snr", t) for p in PREDICTIONS]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-3, atol=0)


def test_min_snr_weights_follow_the_formula():
    log_snr = torch.tensor([-4.0, 0.0, 4.0])
    weight = loss_weight(Diffusion(prediction="x0", weighting="min-snr", snr_clip=5), log_snr)
    torch.testing.assert_close(weight, torch.tensor([0.0183156, 1.0, 5.0]))


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="unknown schedule 'sqrt': known are linear, cosine"):
        make_schedule("sqrt")
    with pytest.raises(ValueError, match="known are eps, x0, v"):
        target_from("u", *torch.zeros(4, 1))
