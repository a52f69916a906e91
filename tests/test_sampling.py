from __future__ import annotations

import numpy as np
import pytest
import torch

from maskdm.diffusion.schedule import make_schedule, target_from
from maskdm.hub import MaskDMPipeline, load_pipeline, make_pipeline
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling.generate import (
    generate,
    generate_on_all_ranks,
    initial_noise,
    to_uint8,
)
from maskdm.sampling.samplers import SAMPLERS, make_scheduler
from maskdm.training.trainer import build_model, train

MEAN, STD = 0.3, 0.4  # a Gaussian whose best denoiser is known in closed form


def best_denoiser(diffusion: Diffusion):
    """The posterior mean of x0 ~ N(MEAN, STD^2) given x_t, in the asked prediction."""
    schedule = make_schedule(diffusion.schedule)

    def denoise(x_t: torch.Tensor, t: float) -> torch.Tensor:
        time = torch.tensor(t)
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x_t - alpha * MEAN)
        return target_from(diffusion.prediction, x0, (x_t - alpha * x0) / sigma, alpha, sigma)

    return denoise


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samplers_reproduce_a_gaussian_from_its_closed_form(sampler, schedule, prediction, eta):
    diffusion = Diffusion(schedule=schedule, prediction=prediction)
    settings = Sampling(sampler=sampler, steps=250, eta=eta, clip_x0=False)
    generators = [torch.Generator().manual_seed(i) for i in range(20)]
    noise = torch.stack([torch.randn(50, 20, generator=g) for g in generators])
    denoise = best_denoiser(diffusion)
    x = SAMPLERS[sampler](denoise, noise, make_scheduler(diffusion), settings, generators)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.012)  # four standard errors
    assert x.std().item() == pytest.approx(STD, abs=0.02)


def test_deterministic_ddim_maps_noise_to_the_known_point():
    """For a Gaussian, the probability-flow ODE from x_T ends at MEAN + STD x_T."""
    diffusion = Diffusion(schedule="cosine", prediction="x0")
    noise = torch.linspace(-2, 2, 9).reshape(1, 1, 9)
    scheduler, errors = make_scheduler(diffusion), []
    for steps in (50, 100, 200):
        settings = Sampling(steps=steps, clip_x0=False)
        x = SAMPLERS["ddim"](best_denoiser(diffusion), noise, scheduler, settings, [])
        errors.append((x - (MEAN + STD * noise)).abs().max().item())
    assert errors[2] < 0.02 and errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]  # first order


def trace(clip: bool, eta: float = 0.0) -> tuple[list[torch.Tensor], list[float]]:
    """x_t and t at each call of a network that always sees an image of 3, and where it ends."""
    points, times = [], []

    def overshoots(x_t: torch.Tensor, t: float) -> torch.Tensor:
        points.append(x_t)
        times.append(t)
        return torch.full_like(x_t, 3.0)

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(9))
    settings = Sampling(steps=4, clip_x0=clip, eta=eta)
    scheduler = make_scheduler(Diffusion(prediction="x0"))
    end = SAMPLERS["ddim"](overshoots, noise, scheduler, settings, generators)
    return [*points, end], times


def test_sampling_begins_at_pure_noise_and_steps_evenly():
    points, times = trace(clip=True)
    assert times == pytest.approx([999 / 999, 749 / 999, 499 / 999, 249 / 999])


@pytest.mark.parametrize(("clip", "x0"), [(True, 1.0), (False, 3.0)])
def test_clipping_keeps_image_and_noise_consistent(clip, x0):
    """Each step goes along the noise that x_t and the (clipped) image imply."""
    points, times = trace(clip)
    schedule = make_schedule("linear")
    for now, then, t, s in zip(points, points[1:], times, times[1:], strict=False):
        t, s = torch.tensor(t), torch.tensor(s)
        noise = (now - schedule.alpha(t) * x0) / schedule.sigma(t)
        expected = schedule.alpha(s) * x0 + schedule.sigma(s) * noise
        torch.testing.assert_close(then, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(points[-1], torch.full_like(points[-1], x0))


def test_eta_adds_noise_of_each_images_own():
    calm, lively = trace(clip=True)[0], trace(clip=True, eta=1.0)[0]
    assert torch.equal(calm[0], lively[0])
    difference = lively[1] - calm[1]
    assert difference.abs().max() > 0.1 and not torch.allclose(difference[0], difference[1])


@pytest.fixture
def model(tiny) -> UViT:
    model = build_model(tiny).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)  # far from a constant answer
    return model


def draw(model: UViT, indices: list[int], **settings) -> np.ndarray:
    diffusion = Diffusion(schedule="cosine", prediction="x0")
    return generate(model, make_scheduler(diffusion), Sampling(**settings), indices, seed=3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_seed_and_number_alone(model, eta):
    together = draw(model, list(range(7)), steps=20, batch_size=7, eta=eta).astype(int)
    for batch_size in (1, 2, 5):
        apart = draw(model, list(range(7)), steps=20, batch_size=batch_size, eta=eta)
        assert abs(together - apart).max() <= 1  # matrix products round differently
    some = draw(model, [5, 2], steps=20, batch_size=2, eta=eta)
    assert abs(together[[5, 2]] - some).max() <= 1
    assert abs(together[0] - together[1]).max() > 20
    assert np.array_equal(draw(model, [4], steps=20, eta=eta), draw(model, [4], steps=20, eta=eta))


def test_no_two_images_begin_from_the_same_noise():
    """torch's CPU generator would use 32 bits of the seed, by which these two are the same."""
    noise = initial_noise(2, [6079, 10654], (8, 8, 1))
    assert noise.dtype == torch.float32 and noise.shape == (2, 8, 8, 1)
    assert not torch.equal(noise[0], noise[1])
    many = initial_noise(0, list(range(500)), (8, 8, 1))
    assert many.mean().abs() < 0.03 and (many.std() - 1).abs() < 0.03


def test_seeds_and_labels_give_other_images(tiny, model, changed):
    scheduler = make_scheduler(Diffusion(prediction="x0"))
    one = generate_on_all_ranks(model, scheduler, Sampling(steps=4), 3, seed=0)
    two = generate_on_all_ranks(model, scheduler, Sampling(steps=4), 3, seed=1)
    assert one.shape == (3, 8, 8, 1) and not np.array_equal(one, two)
    conditional = build_model(changed(model={**tiny.model.model_dump(), "num_classes": 10})).eval()
    torch.nn.init.normal_(conditional.head.weight, std=0.3)
    torch.nn.init.normal_(conditional.label_embed.weight)
    by_label = [
        generate(conditional, scheduler, Sampling(steps=4), [0], labels=torch.tensor([label]))
        for label in (0, 1)
    ]
    assert not np.array_equal(*by_label)
    in_turn = generate(conditional, scheduler, Sampling(steps=4), [10])  # 10 modulo 10 classes
    again = generate(conditional, scheduler, Sampling(steps=4), [10], labels=torch.tensor([0]))
    assert np.array_equal(in_turn, again)


def test_pixels_are_rounded_and_clipped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 2 * 100 / 255 - 1])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 100]


def test_the_pipeline_folder_alone_gives_the_same_images(tiny, model, tmp_path):
    make_pipeline(model, tiny).save_pretrained(tmp_path)
    pipeline, origin = load_pipeline(tmp_path)
    assert origin == str(tmp_path) and pipeline.settings == tiny.sampling
    images = pipeline(num_images=3, seed=3, output_type="np").images
    assert np.array_equal(images, draw(model, [0, 1, 2], steps=4, batch_size=8))
    pictures = MaskDMPipeline.from_pretrained(tmp_path)(3, seed=3).images
    assert pictures[0].mode == "L" and np.array_equal(np.asarray(pictures[1]), images[1, ..., 0])
    more_steps = pipeline(num_images=3, seed=3, num_inference_steps=20, output_type="np").images
    assert not np.array_equal(images, more_steps)
    with pytest.raises(ValueError, match="known are pil, np"):
        pipeline(output_type="jpeg")


def test_models_are_found_by_run_checkpoint_and_folder(tiny, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_pipeline(tmp_path / "run")
    result = train(tiny, tmp_path / "run", show=False)
    make_pipeline(result.ema, tiny).save_pretrained(tmp_path / "run" / "model")
    expected = result.ema.state_dict()
    for name in ("run", "run/model", "run/checkpoints/step-00000011"):
        pipeline, _ = load_pipeline(tmp_path / name)
        for key, value in pipeline.denoiser.state_dict().items():
            assert torch.equal(value, expected[key])
    early, origin = load_pipeline(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert origin.endswith("step-00000006")
    assert not torch.equal(early.denoiser.state_dict()["head.weight"], expected["head.weight"])
    with pytest.raises(ValueError, match="no run folder, checkpoint or exported model"):
        load_pipeline(tmp_path)
    (tmp_path / "run/checkpoints/step-00000006/ema.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ema.safetensors has 0 of \d+ bytes"):
        load_pipeline(tmp_path / "run" / "checkpoints" / "step-00000006")
