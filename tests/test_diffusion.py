from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from maskdm.diffusion.objective import loss_weight, masked_denoising_loss
from maskdm.diffusion.prediction import (
    add_noise,
    target_from,
    x0_and_noise_from,
)
from maskdm.diffusion.schedule import SCHEDULES, log_snr_shift, make_schedule, schedule_of
from maskdm.diffusion.times import Share, draw_times
from maskdm.families import PREDICTIONS, TIMES
from maskdm.recipe import Diffusion

TABLE_TIMES = torch.arange(1000) / 999
INNER_TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
DISCRETE = ("linear", "cosine")


@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_tables_equal_those_of_diffusers(name, theirs):
    expected = DDPMScheduler(1000, 1e-4, 0.02, theirs).alphas_cumprod.double()
    actual = make_schedule(name).alpha(TABLE_TIMES).double() ** 2
    # diffusers accumulates a thousand factors in float32
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=1e-9)


def test_continuous_schedules_follow_their_formulas():
    t = INNER_TIMES
    beta = 0.1 + 19.9 * torch.linspace(0, 1, 100_001, dtype=torch.float64)
    integral = torch.cat([torch.zeros(1).double(), torch.cumulative_trapezoid(beta) / 100_000])
    at_t = integral[(t * 100_000).round().long()]
    torch.testing.assert_close(make_schedule("vp-sde").alpha(t), (-at_t / 2).exp())

    def cosine(u: torch.Tensor) -> torch.Tensor:
        return ((0.9946 * u + 0.008) / 1.008 * math.pi / 2).cos()

    expected = cosine(t) / cosine(torch.zeros(1).double())
    torch.testing.assert_close(make_schedule("vp-cosine").alpha(t), expected)
    flow = make_schedule("flow")
    torch.testing.assert_close((flow.alpha(t), flow.sigma(t)), (1 - t, t))


def test_the_sde_is_the_limit_of_the_linear_schedule():
    discrete, limit = make_schedule("linear"), make_schedule("vp-sde")
    t = INNER_TIMES
    assert (discrete.log_snr(t) - limit.log_snr(t)).abs().max() < 0.1  # of a range of 20


@pytest.mark.parametrize("shift", [0.0, -2.8, 1.4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_of_one_piece(name, shift):
    """alpha, sigma, log-SNR, its slope and its inverse say the same, at any time."""
    schedule, t = make_schedule(name, shift), INNER_TIMES.clone().requires_grad_()
    log_snr = schedule.log_snr(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    torch.testing.assert_close(log_snr, 2 * (alpha.log() - sigma.log()), rtol=1e-8, atol=1e-8)
    whole = alpha + sigma if name == "flow" else alpha**2 + sigma**2
    torch.testing.assert_close(whole, torch.ones_like(t))
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(
        log_snr.detach() - shift, make_schedule(name).log_snr(t.detach()), rtol=1e-9, atol=1e-9
    )
    back = [schedule.time_of(value) for value in log_snr.tolist()]
    assert back == pytest.approx(t.tolist(), abs=1e-6)
    (slope,) = torch.autograd.grad(log_snr.sum(), t)
    tolerance = 0.05 if name in DISCRETE else 1e-9  # a table's slope is a central difference
    torch.testing.assert_close(schedule.log_snr_slope(t.detach()), slope, rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_finite_from_end_to_end(name):
    schedule, ends = make_schedule(name), torch.tensor([0.0, 1.0])
    log_snr = schedule.log_snr(ends)
    assert log_snr[0] > 9 and log_snr[1] < -9
    assert (schedule.alpha(ends) > 0).all() and (schedule.sigma(ends) > 0).all()
    assert schedule.time_of(30.0) == pytest.approx(0, abs=1e-4)
    assert schedule.time_of(-30.0) == pytest.approx(1, abs=1e-4)


def test_the_shift_keeps_the_noise_on_downsampled_images():
    """A 4x4 box average takes noise of 256 px down to that of 64 px at the same time."""
    assert log_snr_shift(64, 256) == pytest.approx(2 * math.log(64 / 256))
    assert log_snr_shift(None, 256) == 0
    large = schedule_of(Diffusion(schedule="vp-sde", base_size=64), 256)
    small = schedule_of(Diffusion(schedule="vp-sde", base_size=64), 64)
    t = INNER_TIMES
    averaged = (large.sigma(t) / 4) / large.alpha(t)  # noise over signal after the average
    torch.testing.assert_close(averaged, small.sigma(t) / small.alpha(t))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_noise_come_back_from_any_prediction(prediction, name):
    schedule = make_schedule(name)
    x0, noise = torch.randn(2, 99, 7, dtype=torch.float64)
    alpha, sigma = (scale[:, None] for scale in (schedule.alpha(INNER_TIMES),
                                                 schedule.sigma(INNER_TIMES)))  # fmt: skip
    x_t = add_noise(x0, noise, alpha, sigma)
    output = target_from(prediction, x0, noise, alpha, sigma)
    again = x0_and_noise_from(prediction, output, x_t, alpha, sigma)
    torch.testing.assert_close(again, (x0, noise), rtol=1e-9, atol=1e-9)


def draw(settings: Diffusion, num=200_000, rank=0, num_ranks=1, seed=0) -> torch.Tensor:
    own, shared = torch.Generator().manual_seed(seed + 7 * rank), torch.Generator()
    schedule = make_schedule(settings.schedule)
    share = Share(num, rank, num_ranks)
    return draw_times(settings.times, schedule, share, own, shared.manual_seed(seed))


@pytest.mark.parametrize("sampling", TIMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_stay_in_the_schedules_range(schedule, sampling):
    t = draw(Diffusion(schedule=schedule, times={"kind": sampling}), num=20_000)
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    if schedule in DISCRETE:
        index = (t * 999).round()
        assert torch.allclose(index / 999, t)
    else:
        assert t.min() > 0


@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_times_are_drawn_from_the_whole_table_evenly(sampling):
    t = draw(Diffusion(times={"kind": sampling}))
    counts = torch.bincount((t * 999).round().long(), minlength=1000)
    slack = 1 if sampling == "stratified" else 5 * 200**0.5
    assert counts.min() >= 200 - slack and counts.max() <= 200 + slack


def test_stratified_times_fill_the_global_batch_evenly_and_alone_are_uniform():
    settings = Diffusion(schedule="flow", times={"kind": "stratified"})
    ranks = [draw(settings, 4, rank, 3, seed=5) for rank in range(3)]
    gaps = torch.cat(ranks).sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((11,), 1 / 12), rtol=1e-3, atol=1e-4)
    first = torch.cat([draw(settings, 1, 1, 3, seed=seed) for seed in range(2000)])
    assert first.mean() == pytest.approx(0.5, abs=0.03)
    assert first.var() == pytest.approx(1 / 12, abs=0.01)


def test_logit_normal_times_have_a_normal_logit():
    t = draw(Diffusion(schedule="flow", times={"kind": "logit-normal", "mean": 0.8, "std": 0.5}))
    logit = (t.double() / (1 - t.double())).log()
    assert logit.mean() == pytest.approx(0.8, abs=0.01)
    assert logit.std() == pytest.approx(0.5, abs=0.01)
    assert ((logit - 0.8) ** 4).mean() == pytest.approx(3 * 0.5**4, rel=0.05)


def test_soft_truncation_draws_the_least_time_of_a_step_log_uniformly():
    settings = Diffusion(schedule="vp-sde", times={"kind": "soft-truncation"})
    least = torch.stack([draw(settings, 400, seed=seed).min() for seed in range(400)])
    # ln(least) / ln(1e-5) is uniform; the minimum of 400 lies a little above the least
    place = least[least > 0.05].log() / math.log(1e-5)
    assert (least > 0.05).float().mean() == pytest.approx(math.log(0.05) / math.log(1e-5), abs=0.07)
    assert place.mean() == pytest.approx(math.log(0.05) / math.log(1e-5) / 2, abs=0.03)
    t = draw(settings, 20_000, seed=3)
    assert (t > t.min() + (1 - t.min()) / 2).float().mean() == pytest.approx(0.5, abs=0.02)


def loss_of(model, num=4, t=0.3, **settings):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(num, 6, 8, generator=generator) * 2 - 1
    noise = torch.randn(num, 6, 8, generator=generator)
    visible = torch.arange(6).expand(num, 6)
    diffusion = Diffusion(**settings)
    schedule = make_schedule(diffusion.schedule)
    times = torch.full((num,), t)
    return masked_denoising_loss(
        model(x0, noise, schedule), x0, visible, times, noise, schedule, diffusion
    )


def scales(schedule, t):
    return schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]


def believes_in_nothing(prediction):
    """A network that sees the image 0 behind any noise, and says so in the asked prediction."""

    def make(x0, noise, schedule):
        def model(x_t, positions, t, labels):
            alpha, sigma = scales(schedule, t)
            return target_from(prediction, torch.zeros_like(x_t), x_t / sigma, alpha, sigma)

        return model

    return make


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
            alpha, sigma = scales(schedule, t)
            torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
            return target_from(prediction, x0, noise, alpha, sigma)

        return model

    assert loss_of(perfect, prediction=prediction).max() == 0


@pytest.mark.parametrize("t", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("schedule", ["cosine", "vp-sde", "flow"])
@pytest.mark.parametrize("space", PREDICTIONS)
def test_the_loss_space_is_the_error_in_that_space(space, schedule, t):
    """Whatever the network predicts, the loss is that of a network that predicts the space."""
    settings = {"schedule": schedule, "t": t, "loss_space_clip": 1e-6}
    expected = loss_of(believes_in_nothing(space), prediction=space, **settings)
    for prediction in PREDICTIONS:
        answer = believes_in_nothing(prediction)
        actual = loss_of(answer, prediction=prediction, loss_space=space, **settings)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


def test_a_loss_space_is_clipped_near_the_ends():
    """JiT's: predict x0, penalise the flow's velocity, which divides by t, at least 0.05."""
    settings = {"schedule": "flow", "prediction": "x0"}
    ratio = {
        t: (
            loss_of(believes_in_nothing("x0"), t=t, loss_space="flow", **settings)
            / loss_of(believes_in_nothing("x0"), t=t, **settings)
        ).tolist()
        for t in (0.01, 0.5)
    }
    assert ratio[0.5] == pytest.approx([(1 / 0.5) ** 2] * 4, rel=1e-4)
    assert ratio[0.01] == pytest.approx([((0.99 + 0.05) / 0.05) ** 2] * 4, rel=1e-4)
    settings = {"schedule": "flow", "prediction": "eps", "t": 0.99}
    noisy = loss_of(believes_in_nothing("eps"), loss_space="x0", **settings)
    plain = loss_of(believes_in_nothing("eps"), **settings)
    assert (noisy / plain).tolist() == pytest.approx([(0.99 / 0.05) ** 2] * 4, rel=1e-4)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("weighting", ["min-snr", "p2", "sigmoid"])
@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_a_weighting_is_one_loss_written_for_every_prediction(schedule, weighting, t):
    losses = [
        loss_of(
            believes_in_nothing(p),
            prediction=p,
            schedule=schedule,
            weighting={"kind": weighting},
            t=t,
        )
        for p in PREDICTIONS
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-3, atol=0)


def test_weights_follow_their_formulas():
    schedule, t = make_schedule("vp-sde"), torch.tensor([0.1, 0.4, 0.8])
    log_snr = schedule.log_snr(t)
    snr = log_snr.exp()

    def weight(**settings):
        return loss_weight(Diffusion(schedule="vp-sde", **settings), schedule, t)

    torch.testing.assert_close(weight(prediction="eps"), torch.ones(3))
    clipped = torch.minimum(snr, torch.tensor(5.0))
    torch.testing.assert_close(weight(prediction="x0", weighting={"kind": "min-snr"}), clipped)
    torch.testing.assert_close(
        weight(prediction="eps", weighting={"kind": "min-snr"}), clipped / snr
    )
    torch.testing.assert_close(
        weight(prediction="v", weighting={"kind": "min-snr"}), clipped / (snr + 1)
    )
    p2 = weight(prediction="eps", weighting={"kind": "p2", "gamma": 0.5})
    torch.testing.assert_close(p2, 1 / (1 + snr).sqrt())
    slope = (schedule.log_snr(t + 1e-3) - schedule.log_snr(t - 1e-3)) / 2e-3
    sigmoid = weight(prediction="eps", weighting={"kind": "sigmoid", "bias": -1.0})
    expected = -slope / (1 + (log_snr + 1).exp())
    torch.testing.assert_close(sigmoid, expected, rtol=1e-2, atol=0)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="unknown schedule 'sqrt': known: linear, cosine, vp"):
        make_schedule("sqrt")
    with pytest.raises(ValueError, match="known: eps, x0, v, flow"):
        target_from("u", *torch.zeros(4, 1))
    with pytest.raises(ValueError, match="loss_space same, or weighting uniform"):
        Diffusion(weighting={"kind": "p2"}, loss_space="v")
