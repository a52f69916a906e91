"""Images at a time, and a compiled network: faster, and the same images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from maskdm.evaluation.samples import drawn_samples
from maskdm.families import GUIDANCE
from maskdm.models.adapters import DiffusersDenoiser
from maskdm.models.compiling import CompiledForward
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling import speed
from maskdm.sampling.generate import generate
from maskdm.sampling.speed import (
    compile_for_sampling,
    images_at_a_time,
    in_parts,
    is_worth_compiling,
    seconds_of_call,
)


def trained(num_classes: int = 0, depth: int = 3) -> TrainedModel:
    """A small network whose answers vary."""
    torch.manual_seed(0)
    model = UViT(8, 2, 1, 16, depth=depth, num_heads=2, num_classes=num_classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return TrainedModel(model, Diffusion(schedule="cosine", prediction="x0"))


def compiling_by(backend) -> type[CompiledForward]:
    class Other(CompiledForward):
        def __init__(self, model):
            super().__init__(model, backend)

    return Other


@pytest.fixture
def counter(monkeypatch):
    """Compiles by a light backend, and counts graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(speed, "CompiledForward", compiling_by(counter))
    yield counter
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("settings", "num_classes", "visible", "graphs"),
    [
        ({}, 0, False, 1),
        ({"sampler": "heun"}, 0, True, 1),
        ({"guidance": {"kind": "classifier-free"}}, 3, False, 1),
        ({"guidance": {"kind": "autoguidance"}}, 0, False, 2),
        ({"guidance": {"kind": "sparse"}}, 0, False, 1),
    ],
)
def test_a_compiled_network_draws_the_same_images(counter, settings, num_classes, visible, graphs):
    """Full batches by one graph of each network, compiled once; the rest eagerly."""
    chosen = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(10)])
    options = {"visible": chosen if visible else None}
    images = {}
    for way in ("off", "on"):
        sampling = Sampling(steps=3, batch_size=4, compile=way, **settings)
        strong, weak = trained(num_classes), trained(num_classes, depth=1)
        options["weak"] = weak if sampling.guidance.kind == "autoguidance" else None
        images[way] = generate(strong, sampling, list(range(10)), **options)
        assert counter.frame_count == (graphs if way == "on" else 0)
    difference = np.abs(images["on"].astype(int) - images["off"].astype(int))
    assert difference.max() <= 1 and images["on"].std() > 10
    assert np.array_equal(generate(strong, sampling, list(range(10)), **options), images["on"])
    assert counter.frame_count == graphs  # in the next call too


@pytest.mark.parametrize("kind", ["none", "classifier-free", "sparse"])
def test_guidance_costs_the_evaluations_that_are_counted(kind):
    drawing = trained(num_classes=3)
    seen = []
    drawing.model.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2]))
    generate(drawing, Sampling(steps=3, guidance={"kind": kind}), [0, 1])
    patches = sum(images * visible for images, visible in seen)
    assert patches == GUIDANCE[kind].evaluations * 3 * 2 * drawing.model.num_patches


def test_what_cannot_be_compiled_draws_the_same_images_with_a_warning(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(speed, "CompiledForward", compiling_by(broken))
    settings = {"steps": 2, "batch_size": 4}
    expected = generate(trained(), Sampling(**settings), [0, 1, 2, 3, 4])
    with pytest.warns(UserWarning, match="not compiled, runs eagerly: .*no compiler here"):
        images = generate(trained(), Sampling(**settings, compile="on"), [0, 1, 2, 3, 4])
    assert np.array_equal(images, expected)


def test_less_than_a_batch_is_not_worth_compiling(counter):
    generate(trained(), Sampling(steps=2, batch_size=4, compile="on"), [0, 1, 2])
    assert counter.frame_count == 0


def test_auto_does_not_compile_on_a_cpu(counter, monkeypatch):
    monkeypatch.setattr(speed, "COMPILE_FROM_FLOPS", 1)
    generate(trained(), Sampling(steps=2, batch_size=2), [0, 1, 2, 3])
    assert counter.frame_count == 0


class OnGPU:
    """A network of MaskDM-S's size that claims to be on a GPU."""

    num_patches, kind = 256, "uvit"

    def __init__(self):
        self.modules = lambda: iter(())
        self.parameters = lambda: iter([SimpleNamespace(device=torch.device("cuda"))])

    def forward_flops(self, num_visible: int) -> int:
        return 10**8 * num_visible


@pytest.mark.parametrize(
    ("settings", "worth"),
    [
        ({"steps": 50}, 10**17 // (50 * 256 * 10**8)),
        ({"steps": 50, "sampler": "heun"}, 10**17 // (100 * 256 * 10**8)),
        ({"steps": 50, "guidance": {"kind": "classifier-free"}}, 10**17 // (100 * 256 * 10**8)),
    ],
)
def test_auto_compiles_on_a_gpu_where_there_is_work_for_minutes(settings, worth):
    """1e17 FLOP of the network's forward passes."""
    model, sampling = OnGPU(), Sampling(**settings)
    assert is_worth_compiling(model, sampling, worth + 1, 256)
    assert not is_worth_compiling(model, sampling, worth - 1, 256)
    assert not is_worth_compiling(model, sampling, worth + 1, 64)  # drawing fewer patches
    assert not is_worth_compiling(model, Sampling(**settings, compile="off"), 10**9, 256)
    assert is_worth_compiling(model, Sampling(**settings, compile="on"), 1, 256)


def test_auto_takes_as_many_images_as_keep_the_device_busy():
    sizes = {}
    for side in (8, 64, 1024):
        with torch.device("meta"):
            model = UViT(side, 2, 1, 16, depth=1, num_heads=2)
        sizes[side] = images_at_a_time(model.to_empty(device="cpu"), Sampling())
        assert images_at_a_time(model, Sampling(batch_size=7)) == 7
    assert sizes == {8: 128, 64: 2, 1024: 1}  # of 16, 1,024 and 262,144 patches
    assert images_at_a_time(OnGPU(), Sampling()) == 256  # of 65,536 patches
    options = {"norm_num_groups": 4, "block_out_channels": [8, 8, 8, 8]}
    unet = DiffusersDenoiser("unet2d", 64, 16, 1, options=options)
    assert images_at_a_time(unet, Sampling()) == 8  # whatever its masks hide


class Small(torch.nn.Module):
    """Memory for so many images at a time."""

    def __init__(self, inner: UViT, most: int):
        super().__init__()
        self.inner, self.most, self.asked = inner, most, []

    def __getattr__(self, name):
        known = "image_shape patch_size num_patches grid kind config forward_flops".split()
        return getattr(self.inner, name) if name in known else super().__getattr__(name)

    def forward(self, patches, *others):
        if not torch.compiler.is_compiling():
            self.asked.append(len(patches))
        if len(patches) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return self.inner(patches, *others)


def test_where_memory_runs_out_images_are_drawn_in_smaller_parts():
    one = trained()
    expected = generate(one, Sampling(steps=1, batch_size=40), list(range(11)))
    small = TrainedModel(Small(one.model, 3), one.diffusion)
    images = generate(small, Sampling(steps=1), list(range(11)))
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert small.model.asked == [11, 5, 2, 2, 2, 2, 2, 1]
    generate(small, Sampling(steps=1), list(range(4)))
    assert small.model.asked[8:] == [2, 2]  # what fits is remembered
    with pytest.raises(
        RuntimeError, match="batch_size 8 does not fit .* memory: use auto, or less"
    ):
        generate(small, Sampling(steps=1, batch_size=8), list(range(11)))
    nothing = TrainedModel(Small(one.model, 0), one.diffusion)
    with pytest.raises(RuntimeError, match="not even one image fits"):
        generate(nothing, Sampling(steps=1), [0, 1, 2])


def test_what_does_not_fit_is_compiled_for_what_does(counter):
    one = trained()
    expected = generate(one, Sampling(steps=2, batch_size=40), list(range(11)))
    small = TrainedModel(Small(one.model, 3), one.diffusion)
    compile_for_sampling(small, Sampling(compile="on"), None, 1000, 16)
    compiled = small.model.forward
    assert compiled.shape == (2, 16, 4) and counter.frame_count == 1
    images = generate(small, Sampling(compile="on"), list(range(11)))
    assert small.model.forward is compiled and counter.frame_count == 1
    assert images.shape == expected.shape


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def wrong(part: slice) -> None:
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match="shapes don't match"):
        in_parts(trained().model, Sampling(), 3, wrong)


def test_settings_decide_anew_at_every_call(counter):
    one, numbers = trained(), list(range(8))
    generate(one, Sampling(steps=2, batch_size=4, compile="on"), numbers)
    forward = one.model.forward
    assert forward.shape == (4, 16, 4)
    generate(one, Sampling(steps=2, batch_size=4, compile="off"), numbers)
    assert forward.shape is None
    generate(one, Sampling(steps=2, batch_size=2, compile="on"), numbers)
    assert one.model.forward is forward and forward.shape == (2, 16, 4)


def test_guidance_is_refused_before_anything_is_compiled(counter):
    settings = {"steps": 2, "batch_size": 2, "compile": "on"}
    with pytest.raises(ValueError, match="classifier-free guidance is not available"):
        generate(trained(), Sampling(**settings, guidance={"kind": "classifier-free"}), [0, 1])
    with pytest.raises(ValueError, match="autoguidance needs a weak model"):
        generate(trained(), Sampling(**settings, guidance={"kind": "autoguidance"}), [0, 1])
    assert counter.frame_count == 0


def test_a_weak_model_that_is_not_asked_is_not_compiled(counter):
    generate(
        trained(), Sampling(steps=2, batch_size=2, compile="on"), [0, 1], weak=trained(depth=1)
    )
    assert counter.frame_count == 1


def test_an_evaluation_compiles_once_and_only_if_it_draws(counter, tmp_path):
    settings = Sampling(steps=2, batch_size=4, compile="on")
    first = drawn_samples(trained(), settings, 20, 0, tmp_path)
    assert counter.frame_count == 1
    again = drawn_samples(trained(depth=1), settings, 20, 0, tmp_path / "other")
    assert counter.frame_count == 2 and not np.array_equal(again.images[:], first.images[:])
    drawn_samples(trained(), settings, 20, 0, tmp_path)
    assert counter.frame_count == 2


def test_an_evaluation_compiles_for_all_that_it_draws(counter, tmp_path, monkeypatch):
    """Whether it is worth it depends on all images, not on those of a piece."""
    monkeypatch.setattr(speed, "is_worth_compiling", lambda m, s, num, visible: num >= 20)
    drawn_samples(trained(), Sampling(steps=2, batch_size=4), 19, 0, tmp_path)
    assert counter.frame_count == 0
    drawn_samples(trained(), Sampling(steps=3, batch_size=4), 20, 0, tmp_path)
    assert counter.frame_count == 1


def test_an_evaluation_keeps_its_images_in_few_files(tmp_path):
    """All are held open at once, and many systems allow 1,024."""
    samples = drawn_samples(trained(), Sampling(steps=1, batch_size=2), 1001, 0, tmp_path)
    assert samples.images.shape == (1001, 8, 8, 1)
    assert len(list(samples.folder.iterdir())) <= 100


def test_a_batch_size_is_a_number_or_auto():
    for wrong in (0, "most"):
        with pytest.raises(ValueError, match="batch_size"):
            Sampling(batch_size=wrong)


def test_ranks_that_wait_for_each_other_are_measured_over_as_many_calls():
    """By their own clocks one would end a call before another, which would wait for ever."""
    for num in (1, 7):
        calls = list[int]()
        seconds_of_call(calls.append, torch.device("cpu"), 1e-3, lambda own, num=num: num)
        assert calls == list(range(num + 1))


@pytest.mark.gpu
def test_a_gpu_draws_the_same_images_compiled():
    settings = {"steps": 3, "batch_size": 4}
    images = []
    for way in ("off", "on"):
        one = trained()
        one.model.cuda()
        images.append(generate(one, Sampling(**settings, compile=way), list(range(6))).astype(int))
    assert np.abs(images[1] - images[0]).mean() < 2


def test_other_networks_are_compiled_too(counter):
    options = {"norm_num_groups": 4, "block_out_channels": [8, 8, 8, 8]}
    unet = DiffusersDenoiser("unet2d", 16, 4, 1, options=options).eval()
    one = TrainedModel(unet, Diffusion(schedule="cosine"))
    expected = generate(one, Sampling(steps=2, batch_size=2), [0, 1]).astype(int)
    images = generate(one, Sampling(steps=2, batch_size=2, compile="on"), [0, 1]).astype(int)
    assert counter.frame_count == 1 and np.abs(images - expected).max() <= 1
