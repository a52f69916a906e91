"""Networks as programs: run by torch and by ONNX Runtime, they give the same numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export.passes import move_to_device_pass

from maskdm.cli import main
from maskdm.export.pipeline import make_pipeline, save_pipeline
from maskdm.export.program import WholeImages, save_program
from maskdm.models.build import build_model
from maskdm.models.trained import TrainedModel
from maskdm.recipe import Recipe, Sampling
from maskdm.sampling.generate import generate, initial_noise

UNET = {
    "block_out_channels": [4, 8],
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def trained_model(recipe: Recipe, **model: Any) -> TrainedModel:
    settings = {**recipe.model.model_dump(), **model}
    network = build_model(Recipe(**{**recipe.model_dump(), "model": settings})).eval()
    with torch.no_grad():  # zero biases and gates would hide mistakes
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return TrainedModel(network, recipe.final_diffusion)


def inputs(trained: TrainedModel, num: int) -> tuple[torch.Tensor, ...]:
    classes = trained.model.num_classes
    labels = (torch.arange(num) % (classes + 1),) if classes else ()
    return torch.randn(num, 1, 8, 8), torch.rand(num), *labels


def program_of(path: Path) -> tuple[Any, dict[str, Any]]:
    extra = {"maskdm.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["maskdm.json"])


@pytest.mark.parametrize(
    "model",
    [{"num_classes": 3}, {"kind": "vit"}, {"kind": "dit"}, {"kind": "unet2d", "options": UNET}],
    ids=["uvit", "vit", "dit", "unet2d"],
)
def test_a_program_answers_as_the_network_does(tiny, tmp_path, model):
    trained = trained_model(tiny, **model)
    save_program(trained, tmp_path / "network.pt2")
    program, facts = program_of(tmp_path / "network.pt2")
    assert facts["num_classes"] == model.get("num_classes", 0)
    assert facts["max_batch"] == (63 if model.get("kind") == "unet2d" else None)
    for num in (1, 5):  # neither is the number that it was traced with
        given = inputs(trained, num)
        with torch.no_grad():
            torch.testing.assert_close(program(*given), WholeImages(trained)(*given))
    # On another device: as docs/sharing.md moves it.
    moved = move_to_device_pass(torch.export.load(tmp_path / "network.pt2"), "meta").module()
    answer = moved(*(one.to("meta") for one in given))
    assert answer.device.type == "meta" and answer.shape == (5, 1, 8, 8)


def test_a_sampler_in_ten_lines_draws_the_same_images_from_the_program(tiny, tmp_path):
    """DDIM (Song et al. 2021) on the schedule that the file brings; the network answers x0."""
    trained = trained_model(tiny)
    sampling = Sampling(steps=10, clip_x0=True)
    save_pipeline(make_pipeline(trained, sampling), tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "network.pt2")]) == 0
    program, facts = program_of(tmp_path / "network.pt2")
    assert facts["prediction"] == "x0" and facts["schedule"] == "cosine"
    x = initial_noise(7, [0, 1], (8, 8, 1)).movedim(3, 1)
    entries = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99, None]  # trailing
    for i, after in zip(entries[:-1], entries[1:], strict=True):
        powers = [1 / (1 + math.exp(-facts["log_snr"][j])) if j else 1.0 for j in (i, after)]
        (alpha, sigma), (alpha_after, sigma_after) = [(p**0.5, (1 - p) ** 0.5) for p in powers]
        with torch.no_grad():
            x0 = program(x, torch.full((2,), i / 999)).clamp(-1, 1)
        x = alpha_after * x0 + sigma_after * (x - alpha * x0) / sigma
    wanted = generate(trained, sampling, [0, 1], 7)
    images = ((x.movedim(1, 3) + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(images.numpy() - wanted.astype(float)).max() <= 1  # a rounding


def test_onnx_runtime_answers_as_the_network_does(tiny, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    trained = trained_model(tiny, num_classes=3)
    save_program(trained, tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    facts = json.loads(session.get_modelmeta().custom_metadata_map["maskdm.json"])
    assert facts["image_size"] == [8, 8] and len(facts["log_snr"]) == 1000
    names = [one.name for one in session.get_inputs()]
    assert names == ["x", "t", "labels"]
    given = inputs(trained, 5)
    named = dict(zip(names, [one.numpy() for one in given], strict=True))
    (answer,) = session.run(None, named)
    with torch.no_grad():
        wanted = WholeImages(trained)(*given)
    torch.testing.assert_close(torch.from_numpy(answer), wanted, atol=1e-5, rtol=1e-5)


def test_other_suffixes_and_missing_packages_are_named(tiny, tmp_path, monkeypatch, capsys):
    save_pipeline(make_pipeline(trained_model(tiny), tiny.sampling), tmp_path / "model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, text in (
        ("network.bin", "end it in .pt2 (torch.export) or .onnx"),
        ("network.onnx", "ONNX needs onnx, onnxscript: pip install 'maskdm[onnx]'"),
        ("model/network.pt2/x.pt2/../..", "end it in"),
    ):
        assert main(["export", str(tmp_path / "model"), str(tmp_path / name)]) == 2
        assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("network*"))
