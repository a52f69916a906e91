"""Tables of choices: every row leads to its function, and a new member takes one row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_array
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config

import maskdm
from maskdm import families
from maskdm.choices import Later
from maskdm.cli import main
from maskdm.families import BACKBONES, MASKS, SAMPLERS, BackboneKind, MaskKind, SamplerKind
from maskdm.models.backbone import Backbone
from maskdm.recipe import Mask, Model, Recipe, Sampling

DOCS = Path(__file__).parents[1] / "docs"
TABLES = {
    name: table
    for name, table in vars(families).items()
    if name.isupper() and isinstance(table, dict)
}


def test_every_row_leads_to_its_function():
    places = [
        value
        for table in TABLES.values()
        for row in table.values()
        for value in vars(row).values()
        if isinstance(value, Later)
    ]
    assert len(places) > 30
    for place in places:
        assert callable(place.target), place.place


@pytest.mark.parametrize("name", TABLES)
def test_every_member_has_a_help_text_without_a_full_stop(name):
    for row in TABLES[name].values():
        assert row.help and not row.help.endswith(".")


def test_the_tables_need_no_torch():
    code = "import sys, maskdm.recipe, maskdm.recipe_files; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_names_every_member(capsys):
    assert main(["train", "digits", "--help-all"]) == 0
    text = "".join(capsys.readouterr().out.replace("│", "").split())  # long lists are wrapped
    for table in (BACKBONES, MASKS, SAMPLERS, families.SCHEDULES, families.GUIDANCE):
        assert f"{{{','.join(table)}}}" in text


def draw_rows(mask, grid, batch_size, generator):
    """Whole rows of patches."""
    rows, columns = grid
    kept = count_rows(mask, grid)[0] // columns
    noise = torch.rand(batch_size, rows, generator=generator, device=generator.device)
    chosen = noise.argsort(dim=1)[:, :kept].sort(dim=1).values  # (B, kept)
    return (chosen[..., None] * columns + torch.arange(columns)).flatten(1)


def count_rows(mask, grid):
    rows, columns = grid
    return round((1 - mask.rate) * rows) * columns, [n * columns for n in range(rows)]


def test_a_new_kind_of_mask_is_a_row(tiny, changed, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        MASKS, "rows", MaskKind("whole rows", "rows of patches", count_rows, draw_rows)
    )
    visible = maskdm.draw_visible(Mask(kind="rows", rate=0.5), (4, 4), 3, torch.Generator())
    assert visible.shape == (3, 8)
    assert all(len(set((row // 4).tolist())) == 2 for row in visible)
    with pytest.raises(ValueError, match="the nearest possible are 0.25, 0.5"):
        maskdm.num_visible(Mask(kind="rows", rate=0.01), (4, 4))
    stages = [stage.model_dump() for stage in tiny.stages]
    stages[0]["mask"] = {"kind": "rows", "rate": 0.5}
    maskdm.train(changed(stages=stages), tmp_path / "run")
    assert "50 % hidden, rows of patches" in capsys.readouterr().out
    run, out = str(tmp_path / "run"), str(tmp_path / "m.npz")
    flags = ["--mask.kind", "rows", "--mask.rate", "0.5"]
    assert main(["sample", run, "--num", "2", "--out", out, *flags]) == 0
    grey = (np.load(out)["arr_0"] == 128).all(axis=(2, 3))  # (2, 8): hidden rows of pixels
    assert (grey.sum(axis=1) >= 4).all()


class Affine(Backbone, ModelMixin):
    """One matrix for all patches, a table of positions: the smallest denoiser."""

    @register_to_config
    def __init__(
        self, image_size=8, patch_size=2, channels=1, embed_dim=16, num_classes=0,
        label_dropout=0.1, class_names=None,
    ):  # fmt: skip
        super().__init__()
        self.set_grid(image_size, patch_size, channels, num_classes, class_names)
        values = patch_size**2 * channels
        self.block = torch.nn.Linear(values, values)
        self.places = torch.nn.Embedding(self.num_patches, values)

    def forward(self, patches, positions, t, labels=None):
        self.check_labels(labels)
        return self.block(patches) + self.places(positions) * t[:, None, None]


def test_a_new_backbone_is_a_row(tiny, changed, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BACKBONES, "affine", BackboneKind("Affine", "one matrix", Affine))
    recipe = changed(model={"kind": "affine", "patch_size": 2})
    result = maskdm.train(recipe, tmp_path / "run")
    assert "Affine, 0.00 M parameters" in capsys.readouterr().out
    # Counted by PyTorch: one product of 4x4 values for each visible patch, twice backward.
    assert result.ema.forward_flops(8) == 8 * 2 * 4 * 4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["flops"] == 2 * 8 * 3 * 8 * 2 * 4 * 4
    for place in ("run", "run/model", "run@hide"):
        images = as_array(maskdm.load(tmp_path / place)(3).images)
        assert images.shape == (3, 8, 8, 1)
    again = maskdm.MaskDMPipeline.from_pretrained(tmp_path / "run" / "model")
    assert type(again.denoiser) is Affine
    maskdm.train(Recipe(**{**recipe.model_dump(), "init": str(tmp_path / "run")}), tmp_path / "b")
    assert "3 of 3 tensors, 100 % of the weights" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mlp_ratio is for kind uvit or vit, not affine"):
        Model(kind="affine", mlp_ratio=2)


def leap(denoise, noise, levels, settings, generators):
    """The clean image at once, as the network sees it at the noisiest level."""
    return denoise(noise, levels[0].item())


def test_a_new_sampler_is_a_row(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SAMPLERS, "leap", SamplerKind("one evaluation", leap))
    maskdm.train(tiny, tmp_path / "run", show=False)
    out = tmp_path / "x.npz"
    flags = ["--sampler", "leap", "--num", "4"]
    assert main(["sample", str(tmp_path / "run"), "--out", str(out), *flags]) == 0
    assert "4 steps of leap" in capsys.readouterr().out
    ddim = as_array(maskdm.load(tmp_path / "run")(4, settings=Sampling(steps=1)).images)
    assert np.abs(np.load(out)["arr_0"].astype(int) - ddim).max() <= 1  # one step of DDIM is that
    with pytest.raises(ValueError, match="sampler leap has none: use eta 0"):
        Sampling(sampler="leap", eta=0.5)


def test_unknown_members_get_a_hint():
    with pytest.raises(ValueError, match="unknown kind of mask 'blok': did you mean block"):
        Mask(kind="blok", rate=0.5)
    with pytest.raises(ValueError, match="sampler: unknown sampler 'dim': did you mean ddim"):
        Sampling(sampler="dim")


def test_the_page_on_extending_runs(tmp_path):
    """docs/extending.md: its code as one script, from top to bottom."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text("utf-8"), re.S)
    assert len(blocks) >= 5
    (tmp_path / "mine.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "brightness" in done.stdout and "rows of patches" in done.stdout
