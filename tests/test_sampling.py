from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import as_array
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from maskdm import engine
from maskdm.diffusion.schedule import make_schedule, schedule_of
from maskdm.export.pipeline import (
    MaskDMPipeline,
    diffusers_scheduler,
    load,
    make_pipeline,
    pipeline_of_run,
    save_pipeline,
)
from maskdm.families import SAMPLERS
from maskdm.models.build import build_model
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.runs.find import find_model
from maskdm.runs.load import load_model
from maskdm.sampling.denoise import clipped
from maskdm.sampling.generate import (
    generate,
    generate_on_all_ranks,
    initial_noise,
    to_uint8,
)
from maskdm.sampling.samplers import sampling_levels
from maskdm.seeds import derive_seed, image_generator
from maskdm.tokens import patchify
from maskdm.training.trainer import train

X0 = Diffusion(schedule="cosine", prediction="x0")


def trace(clip: bool, eta: float = 0.0) -> tuple[list[torch.Tensor], list[float]]:
    """x_t and log-SNR at each call of a denoiser that always sees an image of 3, and the end."""
    points, seen = [], []

    def overshoots(x: torch.Tensor, log_snr: float) -> torch.Tensor:
        points.append(x)
        seen.append(log_snr)
        return torch.full_like(x, 3.0)

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(9))
    settings = Sampling(steps=4, eta=eta)
    levels = sampling_levels(make_schedule("linear"), settings)
    denoise = clipped(overshoots) if clip else overshoots
    end = SAMPLERS["ddim"].run(denoise, noise, levels, settings, generators)
    return [*points, end], seen


@pytest.mark.parametrize(("clip", "x0"), [(True, 1.0), (False, 3.0)])
def test_clipping_keeps_image_and_noise_consistent(clip, x0):
    """Each step goes along the noise that x_t and the (clipped) image imply."""
    points, levels = trace(clip)
    scales = [make_schedule("linear").scales(torch.tensor(level)) for level in levels]
    for now, then, (a, s), (b, r) in zip(points, points[1:], scales, scales[1:], strict=False):
        expected = b * x0 + r * (now - a * x0) / s
        torch.testing.assert_close(then, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(points[-1], torch.full_like(points[-1], x0))


def test_eta_adds_noise_of_each_images_own():
    calm, lively = trace(clip=True)[0], trace(clip=True, eta=1.0)[0]
    assert torch.equal(calm[0], lively[0])
    difference = lively[1] - calm[1]
    assert difference.abs().max() > 0.1 and not torch.allclose(difference[0], difference[1])
    with pytest.raises(ValueError, match="eta is ddim's noise; sampler heun has none"):
        Sampling(sampler="heun", eta=1.0)


@pytest.fixture
def model(tiny) -> UViT:
    """A network whose answers vary, the same with every version of torch."""
    model = build_model(tiny).eval()
    random = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=random)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=random)
    return model


def draw(model: UViT, indices: list[int], **settings) -> np.ndarray:
    return generate(TrainedModel(model, X0), Sampling(**settings), indices, seed=3)


EACH = [{"sampler": name} for name in SAMPLERS] + [
    {"eta": 1.0},
    {"guidance": {"kind": "sparse", "rate": 0.7}},
]


@pytest.mark.parametrize("settings", EACH, ids=lambda s: "-".join(map(str, s.values())))
def test_an_image_depends_on_its_seed_and_number_alone(model, settings):
    settings = {"steps": 20, **settings}
    if settings.get("sampler") == "euler-maruyama":
        settings["spacing"] = "log-snr"
    together = draw(model, list(range(7)), batch_size=7, **settings).astype(int)
    for batch_size in (1, 2, 5):
        apart = draw(model, list(range(7)), batch_size=batch_size, **settings)
        assert abs(together - apart).max() <= 1  # matrix products round differently
    some = draw(model, [5, 2], batch_size=2, **settings)
    assert abs(together[[5, 2]] - some).max() <= 1
    assert abs(together[0] - together[1:]).max() > 50
    assert np.array_equal(draw(model, [4], **settings), draw(model, [4], **settings))


def test_no_two_of_many_images_share_their_random_numbers():
    """A CPU generator's `manual_seed` takes 32 bits, in which these two images' seeds agree."""
    pair = (35386, 48415)
    low = {derive_seed(0, "sampler", i) % 2**32 for i in pair}
    assert len(low) == 1
    for stream in ("sampler", "sparse", "mask"):
        first, second = (torch.rand(4, generator=image_generator(0, stream, i)) for i in pair)
        assert not torch.equal(first, second)
    seeds = {derive_seed(0, "sampler", i) for i in range(100_000)}
    assert len(seeds) == 100_000
    for seed in (0, 7):  # all 63 bits: the stream is numpy's of the whole seed
        # numpy begins at the last of the 624 words, torch behind it.
        words = np.random.MT19937(derive_seed(seed, "mask", 3)).random_raw(7)[1:]
        drawn = torch.rand(6, generator=image_generator(seed, "mask", 3))
        assert np.array_equal(drawn.numpy() * 2**24, words % 2**24)  # rand keeps 24 bits


def test_images_that_once_coincided_differ(model):
    settings = {"sampler": "euler-maruyama", "spacing": "log-snr", "steps": 20}
    trained = TrainedModel(model, X0)
    one, other = generate(trained, Sampling(**settings), [35386, 48415], seed=0)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bf16_gives_the_images_of_fp32_within_its_rounding(model, sampler, monkeypatch):
    settings = {"sampler": sampler, "steps": 30, "spacing": "log-snr"}
    full = draw(model, list(range(8)), **settings).astype(int)
    monkeypatch.setattr(engine, "choose_precision", lambda *_: ("bf16", "asked for"))
    half = draw(model, list(range(8)), **settings).astype(int)
    assert not np.array_equal(full, half)
    assert abs(full - half).mean() < 2.0  # of 255; bf16 keeps 8 bits of each product
    assert full.std() > 30


def test_no_two_images_begin_from_the_same_noise():
    """torch's CPU generator would use 32 bits of the seed, by which these two are the same."""
    noise = initial_noise(2, [6079, 10654], (8, 8, 1))
    assert noise.dtype == torch.float32 and noise.shape == (2, 8, 8, 1)
    assert not torch.equal(noise[0], noise[1])
    many = initial_noise(0, list(range(500)), (8, 8, 1))
    assert many.mean().abs() < 0.03 and (many.std() - 1).abs() < 0.03


@pytest.fixture
def conditional(tiny, changed) -> TrainedModel:
    model = build_model(changed(model={**tiny.model.model_dump(), "num_classes": 10})).eval()
    random = torch.Generator().manual_seed(2)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=random)
    torch.nn.init.normal_(model.label_embed.weight, generator=random)
    return TrainedModel(model, X0)


def test_seeds_and_labels_give_other_images(model, conditional):
    one = generate_on_all_ranks(TrainedModel(model, X0), Sampling(steps=4), 3, seed=0)
    two = generate_on_all_ranks(TrainedModel(model, X0), Sampling(steps=4), 3, seed=1)
    assert one.shape == (3, 8, 8, 1) and not np.array_equal(one, two)

    def of_class(*labels: int) -> np.ndarray:
        return generate(conditional, Sampling(steps=4), [0], labels=torch.tensor(labels))

    assert not np.array_equal(of_class(0), of_class(1))
    assert not np.array_equal(of_class(0), of_class(10))  # no class
    in_turn = generate(conditional, Sampling(steps=4), [10])  # 10 modulo 10 classes
    again = generate(conditional, Sampling(steps=4), [10], labels=torch.tensor([0]))
    assert np.array_equal(in_turn, again)
    with pytest.raises(ValueError, match=r"labels are 11 to 11.*are 0 to 9 \(10 = none\)"):
        of_class(11)
    with pytest.raises(ValueError, match="has no classes: it takes no labels"):
        generate(TrainedModel(model, X0), Sampling(steps=4), [0], labels=torch.tensor([0]))


def test_pixels_are_rounded_and_clipped():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 2 * 100 / 255 - 1])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 100]


def test_the_pipeline_folder_alone_gives_the_same_images(tiny, model, tmp_path):
    save_pipeline(pipeline_of_run(model, tiny), tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.location.folder == tmp_path / "model" and loaded.sampling == tiny.sampling
    pipeline = load(tmp_path / "model")
    assert pipeline.settings == tiny.sampling
    images = as_array(pipeline(3, seed=3).images)
    assert np.array_equal(images, draw(model, [0, 1, 2], steps=4, batch_size=8))
    again = MaskDMPipeline.from_pretrained(tmp_path / "model")
    pictures = again(3, seed=3).images
    assert pictures[0].mode == "L" and np.array_equal(np.asarray(pictures[1]), images[1, ..., 0])
    more_steps = as_array(pipeline(3, seed=3, num_inference_steps=20).images)
    assert not np.array_equal(images, more_steps)
    guided = again(3, seed=3, settings=Sampling(steps=4, guidance={"kind": "sparse"})).images
    assert not np.array_equal(images, as_array(guided))
    guided_by_itself = Sampling(steps=4, guidance={"kind": "autoguidance", "scale": 3.0})
    same = as_array(again(3, seed=3, settings=guided_by_itself, weak=pipeline).images)
    assert abs(same.astype(int) - images).max() <= 1
    with pytest.raises(ValueError, match="known are pil, np, pt"):
        pipeline(output_type="jpeg")


def test_a_pipeline_keeps_every_sampling_setting(model, tmp_path):
    settings = Sampling(
        sampler="heun", steps=7, spacing="karras", clip_x0=False, 
        guidance={"kind": "sparse", "scale": 3.0, "start": 0.1, "end": 0.9, "weak": "other",
                  "rate": 0.25},
        batch_size=5, compile="on",
    )  # fmt: skip
    untouched = {"eta"}
    for name, field in Sampling.model_fields.items():
        assert name in untouched or getattr(settings, name) != field.default
    diffusion = Diffusion(schedule="flow", base_size=64, prediction="flow")
    pipeline = make_pipeline(TrainedModel(model, diffusion), settings)
    assert pipeline.settings == settings and pipeline.trained.diffusion == diffusion
    save_pipeline(pipeline, tmp_path / "model")
    again = MaskDMPipeline.from_pretrained(tmp_path / "model")
    assert again.settings == settings and again.trained.diffusion == diffusion


@pytest.mark.parametrize("schedule", ["linear", "cosine", "vp-sde", "vp-cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_diffusers_can_sample_an_exported_model_by_its_scheduler(model, schedule, prediction):
    """A plain loop of diffusers over the saved scheduler, against `generate`."""
    diffusion = Diffusion(schedule=schedule, prediction=prediction)
    scheduler = diffusers_scheduler(diffusion, 8)
    assert isinstance(scheduler, DDIMScheduler)
    settings = Sampling(steps=20, clip_x0=True)
    ours = generate(TrainedModel(model, diffusion), settings, [0, 1], seed=3)
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=True)
    scheduler.set_timesteps(20)
    x = patchify(initial_noise(3, [0, 1], (8, 8, 1)), 2)
    with torch.no_grad():
        for step in scheduler.timesteps.tolist():
            t = torch.full((2,), step / 999)
            answer = model(x, torch.arange(16).expand(2, -1), t)
            x = scheduler.step(answer, step, x, use_clipped_model_output=True).prev_sample
    theirs = to_uint8(x.view(2, 4, 4, 2, 2).transpose(2, 3).reshape(2, 8, 8, 1)).numpy()
    # Continuous times are the table's only where they are multiples of 1/1000 rather than 1/999.
    tolerance = 1 if schedule in ("linear", "cosine") else 25
    assert abs(ours.astype(int) - theirs).max() <= tolerance


def test_a_flow_is_exported_as_diffusers_flow():
    scheduler = diffusers_scheduler(Diffusion(schedule="flow", prediction="flow"), 256)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    t = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(scheduler.sigmas, make_schedule("flow").sigma(t), rtol=0, atol=1e-4)
    torch.testing.assert_close(scheduler.timesteps / 1000, t)
    shifted = Diffusion(schedule="flow", prediction="flow", base_size=64)
    sigma = diffusers_scheduler(shifted, 256).sigmas
    expected = schedule_of(shifted, 256).sigma(t)
    torch.testing.assert_close(sigma, expected, rtol=0, atol=1e-4)


def test_models_are_found_by_run_stage_checkpoint_and_folder(tiny, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_model(tmp_path / "run")
    result = train(tiny, tmp_path / "run", show=False)
    save_pipeline(pipeline_of_run(result.ema, tiny), tmp_path / "run" / "model")
    expected = result.ema.state_dict()
    for name in ("run", "run/model", "run@show", "run/checkpoints/step-00000011"):
        loaded = load_model(f"{tmp_path}/{name}")
        assert loaded.location.run == tmp_path / "run"
        assert loaded.trained.diffusion.schedule == "cosine"
        assert loaded.trained.diffusion.prediction == "x0"
        for key, value in loaded.trained.model.state_dict().items():
            assert torch.equal(value, expected[key])
    for name in ("run@hide", "run/checkpoints/step-00000006"):
        early = load_model(f"{tmp_path}/{name}")
        assert early.location.folder.name == "step-00000006"
        assert not torch.equal(
            early.trained.model.state_dict()["head.weight"], expected["head.weight"]
        )
    with pytest.raises(ValueError, match="is not a run's folder, a checkpoint or an exp"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="has no stage 'hid': its stages are hide, show"):
        load_model(f"{tmp_path}/run@hid")
    (tmp_path / "run/checkpoints/step-00000006/ema.safetensors").write_bytes(b"")
    for name in ("run@hide", "run/checkpoints/step-00000006"):
        with pytest.raises(ValueError, match=r"ema.safetensors has 0 of \d+ bytes"):
            load_model(f"{tmp_path}/{name}")
    (tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match="the model in .*model is damaged"):
        load_model(tmp_path / "run")


def test_weights_that_are_missing_or_not_finite_are_refused(tiny, tmp_path):
    train(tiny, tmp_path / "run", show=False)
    file = tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    progress = tmp_path / "run/checkpoints/step-00000011/progress.json"
    counters = json.loads(progress.read_text())
    del counters["crc32"]  # weights that training itself has made so, not a damaged file
    progress.write_text(json.dumps(counters))
    save_file({key: value for key, value in whole.items() if key != "head.weight"}, file)
    with pytest.raises(ValueError, match="model is damaged: its file lacks head.weight"):
        load_model(tmp_path / "run")
    for bad in (float("nan"), float("inf")):
        broken = {key: value.clone() for key, value in whole.items()}
        broken["head.weight"][0, 0] = bad
        save_file(broken, file)
        save_file(broken, tmp_path / "run/checkpoints/step-00000011/ema.safetensors")
        for name in ("run", "run/checkpoints/step-00000011"):
            with pytest.raises(ValueError, match="head.weight contain NaN or infinite values"):
                load_model(tmp_path / name)


def test_a_model_on_the_hub_is_found_by_its_id(tiny, model, tmp_path, monkeypatch):
    """In the layout in which huggingface_hub keeps what it fetched."""
    import huggingface_hub

    cache = tmp_path / "models--someone--faces"
    save_pipeline(pipeline_of_run(model, tiny), cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **more: real(name, cache_dir=tmp_path, local_files_only=True, **more),
    )
    found = find_model("someone/faces")
    assert found.is_exported and found.run is None and found.sampling == tiny.sampling
    with pytest.raises(ValueError, match="someone/else is not a folder, and could not be fetched"):
        find_model("someone/else")
    with pytest.raises(ValueError, match="is not in a run's folder"):
        _ = found.recipe
