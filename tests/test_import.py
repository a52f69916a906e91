"""Other projects' checkpoints: the same answers as the original networks', written out here."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import tiny_settings
from torch import Tensor

import maskdm
from maskdm.cli import main
from maskdm.diffusion.schedule import cosine_betas, linear_betas
from maskdm.models.uvit import UViT
from maskdm.runs.load import load_model
from maskdm.tokens import patchify, unpatchify
from maskdm.training.transfer import transfer_weights

SIDE, PATCH, DEPTH, HIDDEN = 8, 2, 5, 3  # pixels, pixels, blocks, MLP width over the width


def uvit_tensors(
    dim: int = 64, channels: int = 3, classes: int = 0, *options: str
) -> dict[str, Tensor]:
    """Random tensors by the names of U-ViT's checkpoints; options: conv, time, bias."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "patch_embed.proj.weight": (dim, channels, PATCH, PATCH),
        "patch_embed.proj.bias": (dim,),
        "pos_embed": (1, (SIDE // PATCH) ** 2 + 1 + (classes > 0), dim),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "decoder_pred.weight": (PATCH * PATCH * channels, dim),
        "decoder_pred.bias": (PATCH * PATCH * channels,),
    }
    shapes |= {"label_emb.weight": (classes, dim)} if classes else {}
    if "conv" in options:
        shapes |= {
            "final_layer.weight": (channels, channels, 3, 3),
            "final_layer.bias": (channels,),
        }
    if "time" in options:
        shapes |= {"time_embed.0.weight": (4 * dim, dim), "time_embed.0.bias": (4 * dim,)}
        shapes |= {"time_embed.2.weight": (dim, 4 * dim), "time_embed.2.bias": (dim,)}
    ends = [f"{end}_blocks.{i}" for end in ("in", "out") for i in range(DEPTH // 2)]
    for block in ["mid_block", *ends]:
        layers = {"attn.proj": (dim, dim), "mlp.fc1": (HIDDEN * dim, dim)}
        layers |= {"mlp.fc2": (dim, HIDDEN * dim), "norm1": (dim,), "norm2": (dim,)}
        layers |= {"skip_linear": (dim, 2 * dim)} if "out" in block else {}
        for name, shape in layers.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        shapes[f"{block}.attn.qkv.weight"] = (3 * dim, dim)
        shapes |= {f"{block}.attn.qkv.bias": (3 * dim,)} if "bias" in options else {}
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        for name, shape in shapes.items()
    }


def answer(w: dict[str, Tensor], x: Tensor, step: Tensor, labels: Tensor | None, heads: int):
    """U-ViT (Bao et al. 2022, Figure 1) on whole images (B, C, H, W), for steps 0..999.

    A class and the time before the patches, blocks in, a middle, blocks out with skips.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def block(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        parts = zip(*(one.chunk(heads, dim=-1) for one in (q, k, v)), strict=True)
        heard = [
            (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in parts
        ]
        x = x + linear(torch.cat(heard, dim=-1), f"{name}.attn.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return x + linear(gelu, f"{name}.mlp.fc2")

    dim, channels = w["patch_embed.proj.weight"].shape[:2]
    tokens = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    tokens = tokens.flatten(2).transpose(1, 2)
    angles = step[:, None] * 10_000 ** (-torch.arange(dim // 2) / (dim // 2))
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    if "time_embed.0.weight" in w:
        hidden = linear(time, "time_embed.0")
        time = linear(hidden / (1 + (-hidden).exp()), "time_embed.2")
    before = [time] if labels is None else [w["label_emb.weight"][labels], time]
    x = torch.cat([*(one[:, None] for one in before), tokens], dim=1) + w["pos_embed"]
    skips = []
    for i in range(DEPTH // 2):
        x = block(x, f"in_blocks.{i}")
        skips.append(x)
    x = block(x, "mid_block")
    for i in range(DEPTH // 2):
        joined = torch.cat([x, skips.pop()], dim=-1)
        x = block(linear(joined, f"out_blocks.{i}.skip_linear"), f"out_blocks.{i}")
    x = linear(norm(x, "norm"), "decoder_pred")[:, len(before) :]
    rows = SIDE // PATCH
    x = x.view(len(x), rows, rows, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
    x = x.reshape(len(x), channels, SIDE, SIDE)
    if "final_layer.weight" in w:
        x = F.conv2d(x, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return x


def maskdm_content(
    tensors: dict[str, Tensor], betas: Tensor | None = None, no_class: bool = False
) -> dict:
    """What the paper's authors save: averaged weights as given, raw ones larger by 1.

    Around the network stand tables of the schedule, an optimizer and a gradient scaler.
    """
    outer = {"pos_embed": "encoder.encoder_pos_embed", "decoder_pred": "encoder_to_output"}
    network = {}
    for name, tensor in tensors.items():
        first = name.split(".")[0]
        new = name.replace(first, outer[first]) if first in outer else f"encoder.{name}"
        network[new.replace("encoder.final_layer", "final_layer")] = tensor
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            del network[new]
            network |= {
                new.replace("qkv.bias", f"{part}_bias"): b for part, b in (("q", q), ("v", v))
            }
    if no_class:
        network["encoder.uncond_embed"] = network["encoder.label_emb.weight"][-1:]
        network["encoder.label_emb.weight"] = network["encoder.label_emb.weight"][:-1]
    tables = {} if betas is None else {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
    tables = {name: table.float() for name, table in tables.items()}
    raw = {f"model.{name}": tensor + 1 for name, tensor in network.items()} | tables
    averaged = {f"model.{name}": tensor for name, tensor in network.items()} | tables
    ema = {f"online_model.{name}": tensor for name, tensor in raw.items()}
    ema |= {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    ema |= {"initted": torch.tensor([True]), "step": torch.tensor([9])}
    state = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
    return {"step": 9, "model": raw, "opt": state, "ema": ema, "scaler": None}


def imported(tmp_path, content, *flags: str) -> maskdm.MaskDMPipeline:
    torch.save(content, tmp_path / "file.pth")
    out = str(tmp_path / "imported")
    assert main(["import", str(tmp_path / "file.pth"), out, *flags]) == 0
    return maskdm.load(out)


def failure(tmp_path, capsys, content, *flags: str) -> str:
    if content is not None:
        torch.save(content, tmp_path / "file.pth")
    out = tmp_path / "imported"
    assert main(["import", str(tmp_path / "file.pth"), str(out), *flags]) == 2
    assert not out.exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("maskdm: ")
    return lines[0]


def assert_same_answers(model: UViT, tensors: dict[str, Tensor], labels: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, model.image_shape[2], SIDE, SIDE, generator=generator)
    steps = torch.tensor([0.0, 400.0, 999.0])
    expected = answer(tensors, images, steps, labels, model.config.num_heads)
    positions = torch.arange(model.num_patches).repeat(3, 1)
    with torch.no_grad():
        patches = patchify(images.movedim(1, 3), PATCH)
        answers = model(patches, positions, steps / 999, labels)
    ours = unpatchify(answers, PATCH, model.grid).movedim(3, 1)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


VARIANTS = [
    pytest.param((64, 3, 0), id="plain"),
    pytest.param((64, 1, 0, "conv"), id="final convolution"),
    pytest.param((128, 3, 4), id="classes"),
    pytest.param((64, 3, 3, "conv", "time", "bias"), id="everything"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_uvits_checkpoints_give_the_original_networks_answers(tmp_path, variant):
    tensors = uvit_tensors(*variant)
    pipeline = imported(tmp_path, tensors, "--from", "uvit")
    classes = variant[2]
    labels = torch.tensor([0, classes - 1, 1]) if classes else None
    assert_same_answers(pipeline.denoiser, tensors, labels)
    assert pipeline.denoiser.config.num_heads == variant[0] // 64
    assert (pipeline.denoiser.num_classes, pipeline.denoiser.config.label_dropout) == (classes, 0)
    diffusion = pipeline.trained.diffusion
    assert (diffusion.schedule, diffusion.prediction) == ("vp-sde", "eps")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("betas", [linear_betas(), cosine_betas()], ids=["linear", "cosine"])
def test_the_authors_checkpoints_give_the_original_networks_answers(tmp_path, variant, betas):
    tensors = uvit_tensors(*variant)
    for name in tensors:
        if name.endswith("qkv.bias"):  # they have none for the keys
            q, k, v = tensors[name].chunk(3)
            tensors[name] = torch.cat([q, 0 * k, v])
    classes = variant[2]
    content = maskdm_content(tensors, betas, no_class=classes > 0)
    pipeline = imported(tmp_path, content, "--from", "maskdm")
    labels = torch.tensor([0, classes - 1, 1]) if classes else None  # the last one is "no class"
    assert_same_answers(pipeline.denoiser, tensors, labels)
    assert pipeline.denoiser.num_classes == max(classes - 1, 0)
    expected = "linear" if betas[-1] < 0.1 else "cosine"
    assert pipeline.trained.diffusion.schedule == expected
    assert (pipeline.settings.sampler, pipeline.settings.eta) == ("ddim", 1.0)


def test_flags_say_what_a_file_does_not(tmp_path):
    tensors = uvit_tensors(64, 3, 4)
    flags = ("--num-heads", "4", "--no-class", "--schedule", "vp-cosine", "--prediction", "v")
    pipeline = imported(tmp_path, tensors, "--from", "uvit", *flags)
    assert_same_answers(pipeline.denoiser, tensors, torch.tensor([0, 3, 1]))
    assert pipeline.denoiser.config.num_heads == 4
    assert pipeline.denoiser.num_classes == 3 and pipeline.denoiser.config.label_dropout > 0
    diffusion = pipeline.trained.diffusion
    assert (diffusion.schedule, diffusion.prediction) == ("vp-cosine", "v")


def test_raw_weights_of_the_authors_file_and_names_of_a_wrapped_model(tmp_path):
    content = maskdm_content(uvit_tensors(64, 3, 0), cosine_betas())
    raw = {f"module.{name}": tensor.half() for name, tensor in content["model"].items()}
    flags = ("--from", "maskdm", "--weights", "raw", "--schedule", "cosine")
    model = imported(tmp_path, {"model": raw}, *flags).denoiser
    expected = raw["module.model.encoder.norm.weight"].float()
    assert model.norm.weight.dtype == torch.float32 and torch.equal(model.norm.weight, expected)


def test_heads_are_those_of_the_published_models(tmp_path, capsys):
    error = failure(tmp_path, capsys, uvit_tensors(144), "--from", "uvit")
    assert "width 144 is none of the published models': give --num-heads" in error
    widest = {name: one for name, one in uvit_tensors(1152).items() if "_blocks" not in name}
    config = imported(tmp_path, widest, "--from", "uvit").denoiser.config  # U-ViT-H's width
    assert (config.depth, config.num_heads) == (1, 16)


class Ordinary:
    """An object of a class, which a file of tensors cannot hold."""


def test_bad_files_are_refused_in_one_line(tmp_path, capsys):
    good = uvit_tensors()
    theirs = maskdm_content(good, cosine_betas())

    def without(*names: str) -> dict:
        return {name: tensor for name, tensor in good.items() if name not in names}

    def changed(name: str, tensor: Tensor) -> dict:
        return {**good, name: tensor}

    first = "patch_embed.proj.weight"
    uvit = [
        (theirs, "use --from maskdm"),
        ({"a": 1}, f"no tensor is called {first}"),
        ([1, 2], "holds a list, not tensors by name"),
        ({"net": Ordinary()}, "besides tensors, which are never loaded"),
        (without("pos_embed"), "it lacks pos_embed"),
        (without("out_blocks.0.skip_linear.weight"), "it lacks out_blocks.0.skip_linear.weight"),
        (changed("context_embed.weight", torch.ones(1)), "has not: context_embed.weight"),
        (changed(first, torch.ones(64, 12)), "its patch_embed.proj.weight has the shape (64, 12)"),
        (changed("pos_embed", torch.ones(1, 16, 64)), "its 15 positions are not those of a square"),
        (changed("norm.bias", torch.ones(3)), "its norm.bias is (3,), expected (64,)"),
        (changed("norm.bias", torch.full((64,), math.nan)), "norm.bias contains NaN"),
        (uvit_tensors(64, 4, 0), "autoencoder's latents"),
    ]
    for content, expected in uvit:
        assert expected in failure(tmp_path, capsys, content, "--from", "uvit")
    bent = maskdm_content(good, torch.linspace(1e-4, 0.03, 1000))
    authors = [
        (good, "use --from uvit"),
        ({**theirs, "ema": None}, 'it has no ema weights (["ema"]): use --weights raw'),
        ({"model": {}}, "no tensor in"),
        (maskdm_content(good), "it holds no noise schedule: give --schedule"),
        (bent, "its noise schedule of 1000 steps is none of linear, cosine"),
    ]
    for content, expected in authors:
        assert expected in failure(tmp_path, capsys, content, "--from", "maskdm")
    for flags, expected in [
        (("--from", "uvit", "--no-class"), "leave out --no-class"),
        (("--from", "uvit", "--weights", "raw"), "import nnet.pth for the raw ones"),
        (("--from", "uvit", "--num-heads", "5"), "not a multiple of 2 x 5 heads"),
        (("--from", "uvit", "--num-heads", "0"), "--num-heads 0: at least 1"),
        (("--from", "uvit", "--schedule", "cosin"), "did you mean cosine?"),
        (("--from", "edm"), "unknown origin 'edm': known: maskdm, uvit"),
    ]:
        assert expected in failure(tmp_path, capsys, good, *flags)
    for data in (b"", b"not a checkpoint", (tmp_path / "file.pth").read_bytes()[:5000]):
        (tmp_path / "file.pth").write_bytes(data)
        assert "cannot be read: it is damaged" in failure(tmp_path, capsys, None, "--from", "uvit")
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as other:
        other.writestr("a.txt", "a")
    assert "cannot be read: it is damaged" in failure(tmp_path, capsys, None, "--from", "uvit")
    (tmp_path / "file.pth").unlink()
    assert "does not exist" in failure(tmp_path, capsys, None, "--from", "uvit")
    (tmp_path / "file.pth").mkdir()
    assert "is a folder" in failure(tmp_path, capsys, None, "--from", "uvit")


def test_flags_of_a_model_that_knows_no_absent_class_say_so(tmp_path, capsys):
    imported(tmp_path, uvit_tensors(64, 1, 3), "--from", "uvit")
    assert "--model.num-classes 3 --model.label-dropout 0" in capsys.readouterr().out


def test_what_is_in_the_way_is_kept(tmp_path, capsys):
    torch.save(uvit_tensors(), tmp_path / "file.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["import", str(tmp_path / "file.pth"), str(tmp_path / "out"), "--from", "uvit"]
    assert main(arguments) == 2
    assert "is not an empty folder: name a new one" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_imported_model_samples_evaluates_and_is_trained_further(tmp_path, capsys):
    """The command that the import prints takes over every weight."""
    imported(tmp_path, uvit_tensors(64, 1, 0, "conv", "time", "bias"), "--from", "uvit")
    out = str(tmp_path / "imported")
    printed = capsys.readouterr().out.splitlines()
    assert "U-ViT of width 64, 5 blocks, 1 head," in printed[0]
    array = str(tmp_path / "x.npz")
    assert main(["sample", out, "--num", "3", "--steps", "3", "--out", array]) == 0
    assert np.load(array)["arr_0"].shape == (3, SIDE, SIDE, 1)
    evaluate = ["evaluate", out, "--reference", "digits", "--num", "16", "--features", "pca"]
    assert main([*evaluate, "--steps", "3"]) == 0
    capsys.readouterr()

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_settings(), "model": {"kind": "vit"}, "stages": [
        {"name": "show", "steps": 1, "batch_size": 8, "lr": 1e-9}
    ]}))  # fmt: skip
    (command,) = [line.split() for line in printed if "maskdm train RECIPE" in line]
    arguments = command[command.index("RECIPE") + 1 :]
    run = str(tmp_path / "run")
    assert main(["train", str(recipe), *arguments, "--out", run]) == 0
    said = capsys.readouterr().out
    assert "100 % of the weights" in said and "left fresh" not in said
    ours, theirs = (load_model(name).trained.model.state_dict() for name in (run, out))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_transfer_reports_a_time_layer_that_the_recipe_lacks():
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2}
    lines = transfer_weights(UViT(**sizes, time_mlp=True), UViT(**sizes))
    assert "not used: time_embed.0, time_embed.2" in lines
