"""Exported folders in diffusers' hands, and our pipeline in diffusers' words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import as_array
from diffusers import DiTTransformer2DModel, UNet2DModel
from gaussians import Normal, trained
from torch import Generator
from torch.nn import functional as F

from maskdm.export.pipeline import MaskDMPipeline, load, make_pipeline, save_pipeline
from maskdm.export.portable import NETWORKS, self_contained
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.backbone import Backbone
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.models.vit import ViT
from maskdm.recipe import Diffusion, Sampling

SIZES = {"image_size": 8, "patch_size": 2, "channels": 1}
UNET = {
    "block_out_channels": [8, 16], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "layers_per_block": 1, "norm_num_groups": 4,
}  # fmt: skip
SETTINGS = Sampling(steps=5)  # diffusers' DDIM is exact where the steps divide 1,000


def network(kind: str, **options) -> Backbone:
    """A network whose answers vary with all that it is given."""
    torch.manual_seed(1)
    options = {**SIZES, **options}
    if kind in ("uvit", "vit"):
        kinds = {"uvit": UViT, "vit": ViT}
        model = kinds[kind](embed_dim=16, depth=3, num_heads=2, **options)
    else:
        more = {"options": UNET} if kind == "unet2d" else {"embed_dim": 16, "num_heads": 2}
        model = DiffusersDenoiser(kind, depth=2, **more, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pipeline_of(model: Backbone, sampling: Sampling = SETTINGS, **diffusion) -> MaskDMPipeline:
    given = {"schedule": "cosine", "prediction": "x0", **diffusion}
    pipeline = make_pipeline(TrainedModel(model, Diffusion(**given)), sampling)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fixed(seed: int = 5) -> Generator:
    return Generator().manual_seed(seed)


# In an environment without maskdm: a process that cannot import it.
STRANGER = """
import json, sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "maskdm":
            raise ImportError("maskdm is not installed here")
sys.meta_path.insert(0, Forbidden())
import numpy as np, torch
from diffusers import DiffusionPipeline

for folder, trust, anew, options in json.loads(sys.argv[1]):
    try:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert not trust, folder
    except ValueError as error:
        assert trust and "trust_remote_code" in str(error), error
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    if "scheduler" in options:
        import diffusers
        kind = getattr(diffusers, options.pop("scheduler"))
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    def draw(pipeline):
        generator = torch.Generator().manual_seed(5)
        return pipeline(batch_size=3, generator=generator, output_type="np", **options).images
    images = draw(pipeline)
    np.save(folder + ".npy", images)
    if not anew:
        continue
    pipeline.save_pretrained(folder + "-again", variant="fp16")
    again = DiffusionPipeline.from_pretrained(
        folder + "-again", trust_remote_code=True, variant="fp16"
    )
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), images)
assert not [name for name in sys.modules if name.split(".")[0] == "maskdm"]
"""


def sampled_by_a_stranger(
    cases: list[tuple[Path, bool, bool, dict]], home: Path
) -> list[np.ndarray]:
    """Images 0..2 of exported folders, (3, H, W, C) from 0 to 1, drawn where there is no maskdm."""
    argument = json.dumps([(str(folder), *others) for folder, *others in cases])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, argument],
        env={**environment, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        cwd=home,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [np.load(f"{folder}.npy") for folder, *_ in cases]


EXACT = {"num_inference_steps": 5, "use_clipped_model_output": True}  # of the stock DDIMPipeline
GUIDED = Sampling(
    steps=5, guidance={"kind": "classifier-free", "scale": 2.0, "start": 0.1, "end": 0.9}
)
TOKENS = {"options": {"modulation": False, "swiglu": False, "skips": True, "bottleneck": 3}}
CLASSES = {"num_classes": 3, "class_names": ["cat", "dog", "ä"]}
# name: network, its options, diffusion, settings, whether code must be trusted, what a stranger
# says, what we say
FOLDERS = {
    "unet2d": ("unet2d", {}, {}, SETTINGS, False, EXACT, {}),
    "uvit": ("uvit", {}, {}, SETTINGS, True, EXACT, {}),
    "final convolution": ("uvit", {"final_conv": True}, {"prediction": "eps", "base_size": 16},
                          SETTINGS, True, EXACT, {}),
    "vit": ("vit", {}, {}, SETTINGS, True, EXACT, {}),
    "vit of other parts": ("vit", {**CLASSES, **TOKENS}, {}, SETTINGS, True, {}, {}),
    "dit": ("dit", {}, {"prediction": "v"}, SETTINGS, True, {}, {}),
    "classes": ("uvit", CLASSES, {}, SETTINGS, True, {"class_labels": ["dog", "ä", "cat"]},
                {"class_labels": [1, 2, 0]}),
    # With one patch the noise of a step has the same order for us and for them.
    "eta": ("uvit", {**CLASSES, "patch_size": 8}, {}, Sampling(steps=5, eta=1.0), True,
            {"scheduler": "DDIMScheduler"}, {"eta": 1.0}),
    "guidance": ("unet2d", CLASSES, {}, GUIDED, True, {"class_labels": 2}, {"class_labels": "ä"}),
    "guided dit": ("dit", CLASSES, {}, SETTINGS, True, {"guidance_scale": 3.0}, 
                   {"guidance_scale": 3.0}),
    "flow": ("uvit", {}, {"schedule": "flow", "prediction": "flow"}, SETTINGS, True, {}, {}),
    "shifted flow": ("unet2d", {}, {"schedule": "flow", "prediction": "v", "base_size": 4},
                     SETTINGS, True, {}, {}),
    "no clipping": ("dit", {}, {"schedule": "linear", "prediction": "flow"},
                    Sampling(steps=5, clip_x0=False), True, {}, {}),
    "euler": ("dit", {}, {}, SETTINGS, True, {"scheduler": "EulerDiscreteScheduler"}, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' tables
def test_a_stranger_with_diffusers_alone_draws_our_images(tmp_path):
    """With and without `trust_remote_code`; saved anew by diffusers, it still opens."""
    cases, expected = [], []
    for number, name in enumerate(FOLDERS):
        kind, options, diffusion, sampling, trust, said, ours = FOLDERS[name]
        pipeline = pipeline_of(network(kind, **options), sampling, **diffusion)
        pipeline.save_pretrained(tmp_path / str(number))
        anew = name in ("uvit", "classes")
        cases.append((tmp_path / str(number), trust, anew, said))
        if "scheduler" in said:
            scheduler = getattr(diffusers, said["scheduler"])
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        expected.append(pipeline(3, generator=fixed(), output_type="np", **ours).images)
    drawn = sampled_by_a_stranger(cases, tmp_path)
    for name, theirs, images in zip(FOLDERS, drawn, expected, strict=True):
        assert images.std() > 0.03 and theirs.shape == (3, 8, 8, 1), name
        np.testing.assert_allclose(theirs, images, atol=5e-4, err_msg=name)


def test_diffusers_own_classes_open_the_networks(tmp_path):
    unet, dit = network("unet2d"), network("dit")
    save_pipeline(pipeline_of(unet), tmp_path / "unet2d")
    save_pipeline(pipeline_of(dit), tmp_path / "dit")
    for model, kind, place in (
        (unet, UNet2DModel, "unet2d/unet"),
        (dit, DiTTransformer2DModel, "dit/transformer"),
    ):
        again, loading = kind.from_pretrained(tmp_path / place, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
        for name, weights in model.net.state_dict().items():
            assert torch.equal(again.state_dict()[name], weights)


@pytest.mark.parametrize("kind", ["uvit", "vit", "dit", "unet2d"])
def test_our_own_reading_gives_the_same_network(kind, tmp_path):
    model = network(kind, **CLASSES)
    pipeline = pipeline_of(model, GUIDED)
    save_pipeline(pipeline, tmp_path / "model")
    images = as_array(pipeline(4).images)
    network_folder = next(path.parent for path in (tmp_path / "model").glob("*/config.json"))
    code = [path.stem for path in network_folder.glob("*.py")]
    assert code == ([f"image_{kind}"] if kind in ("uvit", "vit") else [])
    for again in (load(tmp_path / "model"), MaskDMPipeline.from_pretrained(tmp_path / "model")):
        assert again.settings == GUIDED and again.denoiser.kind == kind
        assert dict(again.denoiser.config)["class_names"] == ["cat", "dog", "ä"]
        assert not again.denoiser.training
        assert np.array_equal(as_array(again(4).images), images)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("uvit", {"final_conv": True}), ("vit", {}), ("vit", TOKENS)],
    ids=["uvit", "vit", "vit of other parts"],
)
def test_the_code_in_the_folder_is_the_packages(kind, options):
    """It holds no name of maskdm but in words, and computes the same forward pass."""
    model = network(kind, num_classes=3, **options)
    row = NETWORKS[type(model)]
    code = self_contained("A network.", row.parts, row.face)
    assert "import maskdm" not in code and "from maskdm" not in code
    assert len(code.splitlines()) < 600
    names: dict = {"__name__": row.file}
    exec(compile(code, f"{row.file}.py", "exec", dont_inherit=True), names)
    sizes = {**SIZES, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    theirs = names[row.face.__name__](**sizes, **options).eval()
    theirs.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="class_names"):
        names[row.face.__name__](**sizes, **options, class_names=["\x1b"])
    images, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    patches = F.unfold(images, 2, stride=2).movedim(1, 2)  # (B, N, P)
    with torch.no_grad():
        ours = model(patches, torch.arange(16).expand(2, -1), t, labels)
        answer = theirs(images, t * 999, labels).sample
    torch.testing.assert_close(F.fold(ours.movedim(1, 2), (8, 8), 2, stride=2), answer)


def test_a_network_of_ones_own_is_exported_as_before(tmp_path, monkeypatch):
    from maskdm.families import BACKBONES, BackboneKind

    class Mine(UViT):
        pass

    monkeypatch.setitem(BACKBONES, "mine", BackboneKind("mine", "mine", Mine, ()))
    model = Mine(**SIZES, embed_dim=16, depth=3, num_heads=2).eval()
    pipeline = pipeline_of(model)
    save_pipeline(pipeline, tmp_path / "model")
    assert not (tmp_path / "model" / "maskdm.json").exists()
    again = load(tmp_path / "model")
    assert np.array_equal(as_array(again(2).images), as_array(pipeline(2).images))


class Gaussian(Normal):
    """As a pipeline wants it: on a device, of a kind."""

    mean, std, kind = 0.1, 0.3, "uvit"
    device = property(lambda self: self.place.device)


SCHEDULERS = [
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler",
]  # fmt: skip
FIRST_ORDER = {
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' tables
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("cosine", "x0")])
def test_another_scheduler_draws_the_same_distribution(kind, schedule, prediction):
    """Of independent normal values, whose denoiser is known in closed form."""
    model = trained(Gaussian, 32, schedule=schedule, prediction=prediction)
    steps = 250 if kind in FIRST_ORDER else 100
    pipeline = make_pipeline(model, Sampling(steps=steps))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    if kind == "HeunDiscreteScheduler" and schedule == "cosine":
        with pytest.raises(ValueError, match="begins at 20,291 on this noise: its images would be"):
            pipeline(1)
        return
    values = pipeline(8, generator=fixed(), output_type="pt").images * 2 - 1
    assert values.mean().item() == pytest.approx(0.1, abs=0.015)  # 8,192 values: 0.003
    assert values.std().item() == pytest.approx(0.3, rel=0.06)
    assert len(model.model.calls) >= steps


@pytest.mark.parametrize("base_size", [None, 8])
@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"])
def test_another_scheduler_of_a_flow_draws_the_same_distribution(kind, base_size):
    model = trained(Gaussian, 32, schedule="flow", prediction="flow", base_size=base_size)
    pipeline = make_pipeline(model, Sampling(steps=200))
    pipeline.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, f"{kind}Scheduler")
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    values = pipeline(8, generator=fixed(), output_type="pt").images * 2 - 1
    assert values.mean().item() == pytest.approx(0.1, abs=0.015)
    assert values.std().item() == pytest.approx(0.3, rel=0.06)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' tables
def test_a_scheduler_of_other_noise_is_refused():
    pipeline = pipeline_of(network("uvit"))
    for other in (
        diffusers.DDIMScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ):
        pipeline.scheduler = other
        with pytest.raises(ValueError, match="other noise than this model was trained on: make it"):
            pipeline()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:divide by zero")
def test_a_scheduler_that_gives_no_numbers_is_refused():
    clear = pipeline_of(network("uvit"), schedule="vp-sde")
    clear.scheduler = diffusers.DEISMultistepScheduler.from_config(clear.scheduler.config)
    with pytest.raises(ValueError, match="DEISMultistepScheduler divides by 0 on this noise"):
        clear()
    clear.scheduler = diffusers.DDIMScheduler.from_config(clear.scheduler.config)
    with pytest.raises(ValueError, match="300 steps leaves out .*: use 250 or 333"):
        clear(num_inference_steps=300)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' tables
def test_a_scheduler_stays_followed_when_it_is_saved_or_passed_on(tmp_path):
    pipeline = pipeline_of(network("uvit"), Sampling(steps=5, sampler="ddpm"))
    own = pipeline(2, output_type="np").images
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)  # equal to its own
    pipeline.save_pretrained(tmp_path / "own")
    pipeline.scheduler = scheduler
    followed = pipeline(2, output_type="np").images
    assert not np.allclose(own, followed, atol=1e-3)
    pipeline.save_pretrained(tmp_path / "other")
    from_pretrained = MaskDMPipeline.from_pretrained
    for again, expected in (
        (from_pretrained(tmp_path / "own"), own),
        (from_pretrained(tmp_path / "own", scheduler=scheduler), followed),
        (from_pretrained(tmp_path / "other"), followed),
        (MaskDMPipeline.from_pipe(pipeline), followed),
        (MaskDMPipeline.from_pipe(from_pretrained(tmp_path / "own")), own),
        (MaskDMPipeline.from_pipe(pipeline, scheduler=None), own),
    ):
        again.set_progress_bar_config(disable=True)
        assert np.array_equal(again(2, output_type="np").images, expected)
    ddim = pipeline(2, settings=Sampling(steps=5), output_type="np").images
    np.testing.assert_allclose(followed, ddim, atol=1e-4)  # the scheduler is that of the settings
    with pytest.raises(ValueError, match="from_pipe needs a MaskDMPipeline, not DDIMPipeline"):
        MaskDMPipeline.from_pipe(
            diffusers.DiffusionPipeline.from_pretrained(tmp_path / "own", trust_remote_code=True)
        )
    with pytest.raises(ValueError, match="device_map: MaskDMPipeline.from_pretrained takes dtype"):
        from_pretrained(tmp_path / "own", device_map="cuda")


def test_outputs_follow_diffusers_conventions():
    pipeline = pipeline_of(network("uvit"))
    pictures = as_array(pipeline(3, seed=2).images)
    values = pipeline(3, seed=2, output_type="np").images
    assert values.dtype == np.float32 and values.shape == (3, 8, 8, 1)
    assert 0 <= values.min() and values.max() <= 1
    assert np.abs(values * 255 - pictures).max() <= 0.5 + 1e-4
    tensors = pipeline(3, seed=2, output_type="pt").images
    assert torch.equal(tensors, torch.from_numpy(values).movedim(3, 1))
    (only,) = pipeline(3, seed=2, output_type="np", return_dict=False)
    assert np.array_equal(only, values)
    with pytest.raises(ValueError, match="unknown output_type 'latent': known are pil, np, pt"):
        pipeline(output_type="latent")


def test_random_numbers_come_from_a_seed_or_from_generators():
    """Image i depends on the seed and i alone, or on its own generator."""
    noisy = Sampling(steps=5, eta=1.0, batch_size=2)
    pipeline = pipeline_of(network("uvit"), noisy)

    def draw(num: int, **said) -> np.ndarray:
        return pipeline(num, output_type="np", **said).images

    np.testing.assert_allclose(draw(5, seed=3)[:3], draw(3, seed=3), atol=1e-5)
    assert np.array_equal(draw(2, seed=np.int64(3)), draw(2, seed=3))
    assert np.array_equal(draw(2), draw(2, seed=0)) and not np.allclose(draw(2), draw(2, seed=1))
    each = draw(3, generator=[fixed(n) for n in (7, 8, 9)])
    alone = draw(1, generator=[fixed(8)])
    np.testing.assert_allclose(each[1:2], alone, atol=1e-5)
    assert np.array_equal(draw(2, generator=fixed()), draw(2, generator=fixed()))
    generator = fixed()
    assert not np.allclose(draw(2, generator=generator), draw(2, generator=generator))
    with pytest.raises(ValueError, match="seed and generator: give one of them"):
        draw(2, seed=1, generator=fixed())
    with pytest.raises(ValueError, match="1 generators for 2 images: give one for each"):
        draw(2, generator=[fixed()])


def test_running_out_of_memory_changes_no_image_of_a_generator():
    """The part that failed has used random numbers, which its halves need again."""
    auto = Sampling(steps=4, sampler="ddpm", batch_size="auto")
    pipeline, calls = pipeline_of(network("uvit"), auto), []

    def fail_once(*given: object) -> None:
        calls.append(given)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    def draw() -> np.ndarray:
        each = [fixed(n) for n in range(4)]
        return pipeline(4, generator=each, output_type="np").images

    expected = draw()
    hook = pipeline.denoiser.register_forward_pre_hook(fail_once)
    actual = draw()
    hook.remove()
    assert len(calls) == 2 + 1 + 2 * 4
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_classes_guidance_and_noise_are_said_in_diffusers_words():
    pipeline = pipeline_of(network("uvit", **CLASSES))

    def draw(**said) -> np.ndarray:
        return pipeline(3, output_type="np", **said).images

    labels = torch.tensor([1, 1, 1])
    assert np.array_equal(draw(class_labels=1), draw(class_labels=labels))
    assert np.array_equal(draw(class_labels="dog"), draw(class_labels=[1, "dog", 1]))
    assert np.array_equal(draw(), draw(class_labels=[0, 1, 2]))
    guided = Sampling(steps=5, guidance={"kind": "classifier-free", "scale": 4.0})
    assert np.array_equal(draw(guidance_scale=4.0), draw(settings=guided))
    assert np.array_equal(draw(guidance_scale=1.0), draw())
    assert np.array_equal(draw(guidance_scale=1.0, settings=guided), draw())
    assert np.array_equal(draw(eta=1.0), draw(settings=Sampling(steps=5, eta=1.0)))
    assert not np.allclose(draw(eta=1.0), draw())
    noisy = pipeline_of(pipeline.denoiser, Sampling(steps=5, eta=1.0))
    noisy.scheduler = diffusers.DDIMScheduler.from_config(noisy.scheduler.config)
    both = [noisy(3, output_type="np", **said).images for said in ({}, {"eta": 1.0})]
    assert np.array_equal(*both) and not np.allclose(both[0], draw())
    with pytest.raises(ValueError, match="no class 'cow'"):
        draw(class_labels="cow")
    with pytest.raises(ValueError, match="2 classes for 3 images"):
        draw(class_labels=[0, 1])
    with pytest.raises(ValueError, match="eta is ddim's noise; sampler heun has none"):
        draw(eta=1.0, settings=Sampling(sampler="heun"))
    with pytest.raises(ValueError, match="since the model has no classes"):
        pipeline_of(network("uvit"))(guidance_scale=2.0)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' tables
@pytest.mark.parametrize("way", ["ddim", "dpm-solver", "heun", "euler-maruyama", "scheduler"])
def test_a_callback_sees_and_changes_each_step(way):
    sampler = "ddim" if way == "scheduler" else way
    spaced = Sampling(steps=5, sampler=sampler, spacing="log-snr", clip_x0=False)
    if way == "euler-maruyama":
        spaced = Sampling(steps=50, sampler=way, spacing="log-snr")
    pipeline = pipeline_of(network("uvit"), spaced, schedule="linear")
    if way == "scheduler":
        kind = diffusers.EulerDiscreteScheduler
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    seen: list = []

    def watch(pipe, step, timestep, tensors):
        assert pipe is pipeline and tensors["latents"].shape == (2, 1, 8, 8)
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return {}

    images = pipeline(2, output_type="pt", callback_on_step_end=watch).images
    assert [step for step, _, _ in seen] == list(range(spaced.steps))
    times = [timestep for _, timestep, _ in seen]
    assert times[0] == pytest.approx(999, abs=0.1) and times == sorted(times, reverse=True)
    torch.testing.assert_close((seen[-1][2] / 2 + 0.5).clamp(0, 1), images)

    def whiten(pipe, step, timestep, tensors):
        is_last = step == spaced.steps - 1
        return {"latents": torch.ones_like(tensors["latents"])} if is_last else tensors

    assert pipeline(2, output_type="np", callback_on_step_end=whiten).images.min() == 1
    pipeline(callback_on_step_end=lambda *_: None, callback_on_step_end_tensor_inputs=[])
    with pytest.raises(ValueError, match="tensor_inputs: only latents"):
        pipeline(callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["x"])


def test_the_progress_bar_counts_steps(capsys):
    pipeline = pipeline_of(network("uvit"))
    pipeline.set_progress_bar_config(disable=False, ascii=True)
    pipeline()
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["uvit", "vit", "dit", "unet2d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_nearly_the_same_images(kind, dtype, tmp_path):
    pipeline = pipeline_of(network(kind))
    images = pipeline(4, output_type="np").images
    pipeline.save_pretrained(tmp_path)
    half = MaskDMPipeline.from_pretrained(tmp_path, dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert half.dtype == dtype and half(2).images[0].size == (8, 8)
    theirs = half(4, output_type="np").images
    assert theirs.dtype == np.float32 and 0 < np.abs(theirs - images).max() < 0.1
    moved = pipeline.to(dtype)
    assert np.array_equal(moved(4, output_type="np").images, theirs)
    moved.save_pretrained(tmp_path, variant="half")
    weights = sorted(path.name for path in tmp_path.glob("*/*.safetensors"))
    expected = ["diffusion_pytorch_model.half.safetensors", "diffusion_pytorch_model.safetensors"]
    assert weights == expected
    again = MaskDMPipeline.from_pretrained(tmp_path, dtype=dtype, variant="half")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(again(4, output_type="np").images, theirs)
    shared = MaskDMPipeline.from_pipe(again)
    assert shared.denoiser is again.denoiser and shared.dtype == dtype


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["uvit", "vit", "dit", "unet2d"])
def test_an_offloaded_network_draws_the_same_images(kind, device):
    pipeline = pipeline_of(network(kind)).to(device)
    images = pipeline(4, output_type="np").images
    pipeline.to("cpu")
    pipeline.enable_model_cpu_offload(device=device)
    np.testing.assert_allclose(pipeline(4, output_type="np").images, images, atol=0.05)
    assert pipeline(4, output_type="pt").images.device.type == device
    assert next(pipeline.denoiser.parameters()).device.type == "cpu"  # it has gone back
    with pytest.raises(ValueError, match="layer by layer: use enable_model_cpu_offload"):
        pipeline.enable_sequential_cpu_offload()


def test_old_folders_follow_another_scheduler(tmp_path):
    folder = shutil.copytree(Path(__file__).parent / "data" / "old-model", tmp_path / "old")
    pipeline = MaskDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline(4, output_type="np").images
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert not np.allclose(pipeline(4, output_type="np").images, own, atol=1e-3)
    pipeline.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "unet" / "image_uvit.py").is_file()
