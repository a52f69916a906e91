"""Images at a time, and a compiled network: faster, and the same images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from maskdm.models.adapters import GridDenoiser
from maskdm.models.compiling import CompiledForward
from maskdm.models.trained import TrainedModel
from maskdm.models.uvit import UViT
from maskdm.recipe import Diffusion, Sampling
from maskdm.sampling import speed
from maskdm.sampling.generate import generate
from maskdm.sampling.speed import images_at_a_time, in_parts, sampling_flops


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
        ({"guidance": "classifier-free"}, 3, False, 1),
        ({"guidance": "autoguidance"}, 0, False, 2),
        ({"guidance": "sparse"}, 0, False, 1),
    ],
)
def test_a_compiled_network_draws_the_same_images(counter, settings, num_classes, visible, graphs):
    """Full batches by one graph of each network, compiled once; the rest as written."""
    chosen = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(10)])
    options = {"visible": chosen if visible else None}
    images = {}
    for way in ("off", "on"):
        sampling = Sampling(steps=3, batch_size=4, compile=way, **settings)
        strong, weak = trained(num_classes), trained(num_classes, depth=1)
        options["weak"] = weak if sampling.guidance == "autoguidance" else None
        images[way] = generate(strong, sampling, list(range(10)), **options)
        assert counter.frame_count == (graphs if way == "on" else 0)
    difference = np.abs(images["on"].astype(int) - images["off"].astype(int))
    assert difference.max() <= 1 and images["on"].std() > 10
    assert np.array_equal(generate(strong, sampling, list(range(10)), **options), images["on"])
    assert counter.frame_count == graphs  # in the next call too


def test_what_cannot_be_compiled_draws_the_same_images_with_a_warning(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(speed, "CompiledForward", compiling_by(broken))
    settings = {"steps": 2, "batch_size": 4}
    expected = generate(trained(), Sampling(**settings), [0, 1, 2, 3, 4])
    with pytest.warns(UserWarning, match="not compiled, runs as written: .*no compiler here"):
        images = generate(trained(), Sampling(**settings, compile="on"), [0, 1, 2, 3, 4])
    assert np.array_equal(images, expected)


def test_less_than_a_batch_is_not_worth_compiling(counter):
    generate(trained(), Sampling(steps=2, batch_size=4, compile="on"), [0, 1, 2])
    assert counter.frame_count == 0


def test_auto_does_not_compile_on_a_cpu(counter, monkeypatch):
    monkeypatch.setattr(speed, "COMPILE_FROM_FLOPS", 1)
    generate(trained(), Sampling(steps=2, batch_size=2), [0, 1, 2, 3])
    assert counter.frame_count == 0


def test_the_work_of_sampling_is_counted():
    model = trained(3).model
    one = model.forward_flops(16)
    assert sampling_flops(model, Sampling(steps=5), 7, 16) == 35 * one
    assert sampling_flops(model, Sampling(steps=5, sampler="heun"), 7, 16) == 70 * one
    guided = Sampling(steps=5, guidance="classifier-free")
    assert sampling_flops(model, guided, 7, 16) == 70 * one


def test_auto_takes_as_many_images_as_keep_the_device_busy():
    sizes = {}
    for side in (8, 64, 1024):
        with torch.device("meta"):
            model = UViT(side, 2, 1, 16, depth=1, num_heads=2)
        sizes[side] = images_at_a_time(model.to_empty(device="cpu"), Sampling())
        assert images_at_a_time(model, Sampling(batch_size=7)) == 7
    assert sizes == {8: 128, 64: 2, 1024: 1}  # of 16, 1,024 and 262,144 patches


def test_where_memory_runs_out_parts_are_halved_and_no_image_is_missed():
    tried = []

    def draw(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if part.stop - part.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return list(range(part.start, part.stop))

    assert sum(in_parts(11, 8, draw, shrink=True), []) == list(range(11))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    with pytest.raises(RuntimeError, match="8 images at a time don't fit .*: use batch_size auto"):
        in_parts(11, 8, draw, shrink=False)


def test_one_image_that_does_not_fit_and_other_errors_are_raised():
    def full(part: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def wrong(part: slice) -> None:
        raise RuntimeError("shapes don't match")

    with pytest.raises(RuntimeError, match=r"^1 images at a time don't fit .* memory$"):
        in_parts(3, 2, full, shrink=True)
    with pytest.raises(RuntimeError, match="shapes don't match"):
        in_parts(3, 2, wrong, shrink=True)


def test_a_batch_size_is_a_number_or_auto():
    for wrong in (0, "most"):
        with pytest.raises(ValueError, match="batch_size"):
            Sampling(batch_size=wrong)


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
    unet = GridDenoiser("unet2d", 16, 4, 1, options=options).eval()
    one = TrainedModel(unet, Diffusion(schedule="cosine"))
    expected = generate(one, Sampling(steps=2, batch_size=2), [0, 1]).astype(int)
    images = generate(one, Sampling(steps=2, batch_size=2, compile="on"), [0, 1]).astype(int)
    assert counter.frame_count == 1 and np.abs(images - expected).max() <= 1
