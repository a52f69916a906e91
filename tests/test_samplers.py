"""Solvers against distributions whose denoiser is known, and against diffusers' own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from gaussians import Mixture, Normal, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskdm.diffusion.objective import masked_denoising_loss
from maskdm.diffusion.schedule import make_schedule
from maskdm.families import PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling.denoise import x0_denoiser
from maskdm.sampling.samplers import sampling_levels

RANDOM = ("ddpm", "euler-maruyama")
NUM, SIDE = 16, 8  # images, and their values' square root


def solve(model, settings: Sampling, noise: torch.Tensor | None = None) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(NUM)]
    if noise is None:
        noise = torch.stack([torch.randn(SIDE**2, 1, generator=g) for g in generators])
    positions = torch.arange(noise.shape[1]).expand(len(noise), -1)
    levels = sampling_levels(model.schedule, settings)
    denoise = x0_denoiser(model, positions, None)
    with torch.no_grad():
        return SAMPLERS[settings.sampler].run(denoise, noise, levels, settings, generators)


def refuses(sampler: str, spacing: str, schedule: str) -> bool:
    return (sampler, spacing) == ("euler-maruyama", "uniform") and schedule in ("cosine", "flow")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_sampler_on_every_schedule_reproduces_a_gaussian_or_is_refused(sampler, schedule):
    """A sampler never sees the prediction, only clean images: one prediction serves."""
    model = trained(Normal, SIDE, schedule=schedule, prediction="v")
    for spacing in ("uniform", "log-snr"):
        settings = Sampling(sampler=sampler, steps=160, spacing=spacing)
        if refuses(sampler, spacing, schedule):
            with pytest.raises(
                ValueError, match=r"euler-maruyama in 160 steps is unstable.*log-snr"
            ):
                solve(model, settings)
            continue
        assert_normal(solve(model, settings), abs_std=0.04 if sampler in RANDOM else 0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_reproduces_a_gaussian(prediction):
    for schedule in ("linear", "flow"):
        model = trained(Normal, SIDE, schedule=schedule, prediction=prediction)
        assert_normal(solve(model, Sampling(sampler="unipc", steps=40)), abs_std=0.02)


def assert_normal(x: torch.Tensor, abs_std: float) -> None:
    assert x.mean().item() == pytest.approx(Normal.mean, abs=0.05)  # four standard errors
    assert x.std().item() == pytest.approx(Normal.std, abs=abs_std)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_reproduces_a_mixture(sampler):
    model = trained(Mixture, 32, schedule="vp-sde", prediction="v")
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(NUM, 32 * 32, 1, generator=generator)
    settings = Sampling(sampler=sampler, steps=200, spacing="log-snr")
    x = solve(model, settings, noise)
    low = x < 0
    assert low.double().mean().item() == pytest.approx(0.3, abs=0.015)
    for part, mean in ((low, -0.6), (~low, 0.5)):
        assert x[part].mean().item() == pytest.approx(mean, abs=0.01)
        assert x[part].std().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("schedule", ["vp-sde", "flow"])
@pytest.mark.parametrize(
    ("sampler", "order"),
    [("ddim", 1), ("dpm-solver", 2), ("dpm-solver-eps", 3), ("unipc", 2), ("heun", 2)],
)
def test_solvers_converge_at_their_order(sampler, order, schedule):
    """To where the ODE leads from the first to the last level, and the denoiser from there."""
    model = trained(Normal, 3, schedule=schedule, prediction="x0")
    noise = torch.linspace(-2, 2, 9).reshape(1, 9, 1)
    mean, std, errors = Normal.mean, Normal.std, []
    for steps in (40, 80, 160):
        settings = Sampling(sampler=sampler, steps=steps, spacing="log-snr")
        levels = sampling_levels(model.schedule, settings)
        alpha, sigma = levels.sigmoid().sqrt(), (-levels).sigmoid().sqrt()
        spread = (alpha**2 * std**2 + sigma**2).sqrt()
        normal = (noise - alpha[0] * mean) / spread[0]  # which the ODE keeps
        last = alpha[-1] * mean + spread[-1] * normal
        end = mean + alpha[-1] * std**2 / spread[-1] ** 2 * (last - alpha[-1] * mean)
        errors.append((solve(model, settings, noise) - end).abs().max().item())
    rates = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    assert errors[-1] < (0.04 if order == 1 else 0.004)
    assert min(rates) > order - 0.35, (errors, rates)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.filterwarnings("ignore:.*dpmsolver and sde-dpmsolver:FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_dpm_solver_in_the_noise_goes_where_diffusers_own_goes(order):
    """Theirs extrapolates otherwise, to the same end: it nears ours as the steps grow in number."""
    model = trained(Normal, SIDE, schedule="linear", prediction="eps")
    apart = []
    for steps in (100, 200):
        ours = solve(model, Sampling(sampler="dpm-solver-eps", steps=steps))
        generators = [torch.Generator().manual_seed(i) for i in range(NUM)]
        x = torch.stack([torch.randn(SIDE**2, 1, generator=g) for g in generators])
        theirs = DPMSolverMultistepScheduler(
            1000, 1e-4, 0.02, "linear", algorithm_type="dpmsolver", solver_order=order,
            final_sigmas_type="sigma_min", timestep_spacing="trailing",
        )  # fmt: skip
        theirs.set_timesteps(steps)
        positions = torch.arange(SIDE**2).expand(NUM, -1)
        with torch.no_grad():
            for step in theirs.timesteps:
                eps = model.model(x, positions, torch.full((NUM,), step.item() / 999), None)
                x = theirs.step(eps.float(), step, x).prev_sample
        apart.append((x - ours).abs().max().item())
    assert apart[1] < apart[0] / 2 and apart[1] < 0.02, apart


@pytest.mark.parametrize(
    ("sampler", "theirs", "options"),
    [
        ("ddim", DDIMScheduler, {"clip_sample": False}),
        ("ddpm", DDPMScheduler, {"clip_sample": False}),
        ("dpm-solver", DPMSolverMultistepScheduler, {}),
        ("unipc", UniPCMultistepScheduler, {}),
    ],
)
@pytest.mark.parametrize(("name", "prediction"), [("linear", "eps"), ("cosine", "x0")])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_diffusers_own_loop_gives_the_same(sampler, theirs, options, name, prediction):
    """Their scheduler on its own thousand steps, with the same network and noise."""
    model = trained(Normal, SIDE, schedule=name, prediction=prediction)
    settings = Sampling(sampler=sampler, steps=50)
    ours = solve(model, settings)
    generators = [torch.Generator().manual_seed(i) for i in range(NUM)]
    x = torch.stack([torch.randn(SIDE**2, 1, generator=g) for g in generators])
    options = {
        "timestep_spacing": "trailing",
        "prediction_type": {"eps": "epsilon", "x0": "sample"}[prediction],
        **options,
    }
    beta_schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[name]
    scheduler = theirs(1000, 1e-4, 0.02, beta_schedule, **options)
    scheduler.set_timesteps(50)
    x = x * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, step)
        t = torch.full((NUM,), step.item() / 999)
        answer = model.model(scaled, torch.zeros(NUM, SIDE**2).long(), t, None).float()
        more = {"generator": generators} if sampler in ("ddim", "ddpm") else {}
        x = scheduler.step(answer, step, x, **more).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=3e-3)  # they multiply betas in float32


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_heun_goes_where_diffusers_heun_goes():
    """Other coordinates, so that they meet only as steps shrink."""
    model = trained(Normal, SIDE, schedule="linear", prediction="eps")
    ours = solve(model, Sampling(sampler="heun", steps=200))
    generators = [torch.Generator().manual_seed(i) for i in range(NUM)]
    x = torch.stack([torch.randn(SIDE**2, 1, generator=g) for g in generators])
    scheduler = HeunDiscreteScheduler(1000, 1e-4, 0.02, "linear", timestep_spacing="trailing")
    scheduler.set_timesteps(200)
    x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
    for step in scheduler.timesteps:
        t = torch.full((NUM,), step.item() / 999)
        scaled = scheduler.scale_model_input(x, step)
        eps = model.model(scaled, torch.zeros(NUM, SIDE**2).long(), t, None).float()
        x = scheduler.step(eps, step, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-3)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver", "unipc", "heun"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_few_even_steps_are_enough_on_every_schedule(sampler, schedule):
    """Also where the first step leaves a noise that is nearly without signal."""
    model = trained(Normal, SIDE, schedule=schedule, prediction="x0")
    x = solve(model, Sampling(sampler=sampler, steps=20))
    assert x.mean().item() == pytest.approx(Normal.mean, abs=0.06)
    assert x.std().item() == pytest.approx(Normal.std, rel=0.2 if sampler == "ddim" else 0.06)


def test_evenly_spaced_times_start_at_pure_noise():
    linear, flow = make_schedule("linear"), make_schedule("flow")
    levels = sampling_levels(linear, Sampling(steps=4))
    assert [linear.time_of(x) * 999 for x in levels.tolist()] == pytest.approx([999, 749, 499, 249])
    levels = sampling_levels(linear, Sampling(steps=3))  # not a divisor of 1000
    assert [linear.time_of(x) * 999 for x in levels.tolist()] == pytest.approx([999, 666, 332])
    levels = sampling_levels(flow, Sampling(steps=4))
    assert [flow.time_of(x) for x in levels.tolist()] == pytest.approx(
        [1, 0.75, 0.5, 0.25], abs=1e-4
    )
    sde = make_schedule("vp-sde")
    levels = sampling_levels(sde, Sampling(steps=1000))  # the paper's lineage: from 1 to 1e-3
    assert sde.time_of(levels[-1].item()) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="1001 sampling steps, but the schedule has 1000 times"):
        sampling_levels(linear, Sampling(steps=1001))


@pytest.mark.parametrize("name", SCHEDULES)
def test_other_spacings_run_from_noise_to_nearly_clean(name):
    schedule = make_schedule(name)
    even = sampling_levels(schedule, Sampling(steps=9, spacing="log-snr"))
    torch.testing.assert_close(even.diff(), even.diff()[:1].expand(8))
    karras = sampling_levels(schedule, Sampling(steps=9, spacing="karras"))
    roots = (-karras / 2 / 7).exp()  # (sigma / alpha) ^ (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(8))
    for levels in (even, karras):
        assert schedule.time_of(levels[0].item()) == pytest.approx(1, abs=1e-4)
        assert schedule.time_of(levels[-1].item()) == pytest.approx(
            0 if schedule.num_times else 1e-3, abs=1e-4
        )


@pytest.mark.parametrize("schedule", ["linear", "vp-cosine", "flow"])
def test_the_network_is_asked_at_the_times_it_was_trained_on(schedule):
    """x_t comes scaled as the schedule has it, with the time of that noise."""
    model = trained(Normal, SIDE, schedule=schedule, prediction="x0")
    solve(model, Sampling(sampler="ddim", steps=100))
    for x_t, t in model.model.calls:
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        expected = (alpha**2 * Normal.std**2 + sigma**2).sqrt()
        assert x_t.std().item() == pytest.approx(expected.item(), rel=0.08)


def test_one_step_gives_the_denoisers_first_answer():
    for sampler in SAMPLERS:
        model = trained(Normal, SIDE, schedule="vp-sde", prediction="x0")
        x = solve(model, Sampling(sampler=sampler, steps=1))
        assert len(model.model.calls) == 1, sampler
        assert x.mean().item() == pytest.approx(Normal.mean, abs=1e-2)


class NoDoubles(TorchDispatchMode):
    """Fails where a float64 tensor would go to a device: Apple's mps has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for one in tree_leaves(answer):
            if isinstance(one, torch.Tensor) and one.device.type == "meta":
                assert one.dtype != torch.float64, function
        return answer


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_in_float64_goes_to_the_device(sampler, schedule):
    """On the device `meta`, which computes shapes and types alone."""
    model = trained(Normal, SIDE, schedule=schedule, prediction="v")
    noise = torch.zeros(NUM, 4, 1, device="meta")
    positions, t = torch.zeros(NUM, 4, dtype=torch.int64, device="meta"), torch.rand(NUM)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.place = nn.Parameter(torch.zeros(1, device="meta"))  # tells the dtype

        def forward(self, patches, positions, t, labels):
            return patches * t[:, None, None]

    network = Network()
    settings = Sampling(sampler=sampler, steps=40, spacing="log-snr")
    levels = sampling_levels(model.schedule, settings)
    generators = [torch.Generator() for _ in range(NUM)]
    with NoDoubles(), torch.no_grad():
        denoise = x0_denoiser(
            SimpleNamespace(model=network, schedule=model.schedule, diffusion=model.diffusion),
            positions,
            None,
        )
        x = SAMPLERS[sampler].run(denoise, noise, levels, settings, generators)
        assert x.dtype == torch.float32 and x.device.type == "meta"
        for weighting in WEIGHTINGS:
            diffusion = Diffusion(schedule=schedule, prediction="v", weighting={"kind": weighting})
            masked_denoising_loss(
                network, noise, positions, t.to("meta"), noise, model.schedule, diffusion
            )
