"""Starting from another run's weights; parts of a data set; stages of unlike schedules."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskdm.export.pipeline import pipeline_of_run, save_pipeline
from maskdm.images.order import training_subset
from maskdm.images.store import open_store
from maskdm.models.build import build_model
from maskdm.models.uvit import UViT
from maskdm.models.vit import ViT
from maskdm.recipe import Data, Recipe, Sampling
from maskdm.runs.load import load_model, load_weak
from maskdm.sampling.generate import generate
from maskdm.training.step import draw_batch
from maskdm.training.trainer import train
from maskdm.training.transfer import transfer_weights

SMALL = {"image_size": 8, "patch_size": 2, "channels": 1, "embed_dim": 16, "depth": 3}


def uvit(kind: type[UViT | ViT] = UViT, **changes) -> UViT | ViT:
    model = kind(**{**SMALL, "num_heads": 2, **changes})
    for parameter in model.parameters():  # nothing is zero or one, so that nothing fits by chance
        torch.nn.init.normal_(parameter)
    return model


def vit(**changes) -> ViT:
    return uvit(ViT, **changes)


def test_equal_models_are_copied_whole():
    source, target = uvit(), uvit()
    assert transfer_weights(source, target) == ["42 of 42 tensors, 100 % of the weights"]
    for one, other in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(one, other)


def test_positions_of_another_grid_are_interpolated():
    """A ramp over the grid is a ramp again; the time's own position stays."""
    source, target = uvit(), uvit(image_size=16)
    rows = torch.arange(4.0).repeat_interleave(4)
    with torch.no_grad():
        source.pos_embed[1:] = rows[:, None]
    lines = transfer_weights(source, target)
    assert "positions interpolated from 4x4 to 8x8" in lines
    assert torch.equal(target.pos_embed[0], source.pos_embed[0])
    column = target.pos_embed.detach()[1:, 0].view(8, 8)[:, 3]
    # New row i lies at (i + 0.5) / 2 - 0.5 of the old; where the edges play no part, exactly.
    torch.testing.assert_close(column[3:5], torch.tensor([1.25, 1.75]), rtol=1e-4, atol=1e-4)
    images = torch.randn(2, 64, 4)
    assert target(images, torch.arange(64).expand(2, -1), torch.rand(2)).shape == (2, 64, 4)


def test_classes_come_go_and_change():
    plain, three, five = uvit(), uvit(num_classes=3), uvit(num_classes=5)
    fresh = five.label_embed.weight.detach().clone()
    lines = transfer_weights(three, five)
    assert torch.equal(five.label_embed.weight[5], three.label_embed.weight[3])  # "no class"
    assert torch.equal(five.label_embed.weight[:5], fresh[:5])
    assert torch.equal(five.pos_embed, three.pos_embed)
    assert "classes left fresh, except for no class: 3 -> 5" in lines
    assert "100 %" not in lines[0]

    conditional = uvit(num_classes=3)
    label_position = conditional.pos_embed[0].detach().clone()
    lines = transfer_weights(plain, conditional)
    assert torch.equal(conditional.pos_embed[1:], plain.pos_embed)
    assert torch.equal(conditional.pos_embed[0], label_position)
    assert "left fresh: label_embed" in lines

    unconditional = uvit()
    lines = transfer_weights(three, unconditional)
    assert torch.equal(unconditional.pos_embed, three.pos_embed[1:])
    assert "not used: label_embed" in lines


def test_as_many_rows_of_other_classes_do_not_fit():
    """Two classes and "no class" have three rows, as have three classes without it."""
    source, target = uvit(num_classes=2, label_dropout=0.1), uvit(num_classes=3, label_dropout=0)
    fresh = target.label_embed.weight.detach().clone()
    assert "left fresh: label_embed" in transfer_weights(source, target)
    assert torch.equal(target.label_embed.weight, fresh)


@pytest.mark.parametrize("modulation", [True, False])
def test_a_vit_starts_from_one_of_another_grid(modulation):
    options = {"modulation": modulation}
    source, target = vit(options=options), vit(options=options, image_size=16)
    before = source.num_extras
    with torch.no_grad():
        source.pos_embed[before:] = torch.arange(4.0).repeat_interleave(4)[:, None]
    assert "positions interpolated from 4x4 to 8x8" in transfer_weights(source, target)
    assert torch.equal(target.pos_embed[:before], source.pos_embed[:before])
    column = target.pos_embed.detach()[before:, 0].view(8, 8)[:, 3]
    torch.testing.assert_close(column[3:5], torch.tensor([1.25, 1.75]), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_left_fresh_and_named():
    source, target = uvit(), uvit(channels=3, num_heads=4)
    head = target.head.weight.detach().clone()
    lines = transfer_weights(source, target)
    assert "left fresh: patch_embed, head" in lines
    assert "note: trained with 2 attention heads, now read as 4" in lines
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.mid_block.attn.qkv.weight, source.mid_block.attn.qkv.weight)


def test_nothing_in_common_is_an_error_and_changes_nothing():
    source, target = uvit(), uvit(embed_dim=32)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match="no weights of.* a U-ViT of width 16, .*width 32"):
        transfer_weights(source, target)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def weights(folder, kind: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{kind}.safetensors")


@pytest.fixture
def source_run(tiny, tmp_path):
    result = train(tiny, tmp_path / "source", show=False)
    save_pipeline(pipeline_of_run(result.ema, tiny), tmp_path / "source" / "model")
    return tmp_path / "source"


def test_a_refusal_names_only_sizes_that_a_network_has(changed):
    options = {"norm_num_groups": 4, "block_out_channels": [8, 8, 8, 8]}
    unet = build_model(changed(model={"kind": "unet2d", "patch_size": 2, "options": options}))
    uvit = build_model(changed())
    with pytest.raises(ValueError) as caught:
        transfer_weights(unet, uvit)
    theirs, ours = str(caught.value).split("the new one is")
    assert "it is a U-Net of options" in theirs
    assert not any(word in theirs for word in ("width", "depth", "heads"))
    assert ours.strip() == "a U-ViT of width 16, depth 3, heads 2: use --model.kind unet2d"


def test_a_run_starts_from_anothers_average(tiny, changed, source_run, tmp_path, capsys):
    """From a run, a stage's end, a checkpoint or an export; the new run's first weights are its."""
    still = {**tiny.stages[0].model_dump(), "steps": 1, "warmup": 0}
    still |= {"lr": 1e-12, "weight_decay": 0.0}
    for name in ("", "/model", "@hide", "/checkpoints/step-00000009"):
        init = f"{source_run}{name}"
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        train(changed(init=init, stages=[still]), run, show=True)
        expected = load_model(init).trained.model.state_dict()
        actual = weights(run / "checkpoints" / "step-00000001")
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value)
        assert "init    averaged weights of" in (text := capsys.readouterr().out)
        assert "42 of 42 tensors, 100 % of the weights" in text


def test_a_run_starts_from_anothers_raw_weights(changed, source_run, tmp_path, capsys):
    still = {"name": "a", "steps": 1, "batch_size": 8, "lr": 1e-12, "weight_decay": 0.0}
    for name in ("", "@hide"):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        init = f"{source_run}{name}"
        train(changed(init=init, init_weights="raw", stages=[still]), run)
        step = {"": "step-00000011", "@hide": "step-00000006"}[name]
        expected = weights(source_run / "checkpoints" / step, "model")
        averaged = weights(source_run / "checkpoints" / step, "ema")
        assert not torch.equal(expected["pos_embed"], averaged["pos_embed"])
        for key, value in weights(run / "checkpoints" / "step-00000001").items():
            torch.testing.assert_close(value, expected[key])
        assert "init    raw weights of" in capsys.readouterr().out
    shutil.copytree(source_run / "model", tmp_path / "model-alone")
    recipe = changed(init=str(tmp_path / "model-alone"), init_weights="raw")
    with pytest.raises(ValueError, match="averaged weights only: use init_weights ema"):
        train(recipe, tmp_path / "c", show=False)


def test_an_init_is_read_once_and_refused_before_anything_is_written(
    tiny, changed, source_run, tmp_path
):
    with pytest.raises(ValueError, match="does not exist"):
        train(changed(init=str(tmp_path / "nothing")), tmp_path / "a", show=False)
    wide = {**tiny.model.model_dump(), "embed_dim": 32}
    with pytest.raises(ValueError, match="init .*source: no weights of the model"):
        train(changed(init=str(source_run), model=wide), tmp_path / "a", show=False)
    other = {**tiny.model.model_dump(), "kind": "vit"}
    with pytest.raises(ValueError, match="the new one is a ViT of .*: use --model.kind uvit"):
        train(changed(init=str(source_run), model=other), tmp_path / "a", show=False)
    assert not (tmp_path / "a").exists()
    recipe = changed(init=str(source_run))
    whole = train(recipe, tmp_path / "b", show=False)
    moved = source_run.rename(tmp_path / "moved")
    again = train(recipe, tmp_path / "b", show=False)  # the run goes on from its own checkpoint
    assert again.checkpoint == whole.checkpoint and moved.is_dir()


def test_a_primer_of_one_diffusion_is_tuned_under_another(
    tiny, changed, source_run, tmp_path, capsys
):
    """Another schedule, prediction, resolution and class count at once; said in the report."""
    recipe = changed(
        init=f"{source_run}@hide",
        data={"source": "digits", "size": 16, "channels": 1},
        model={**tiny.model.model_dump(), "num_classes": 10},
        diffusion={"schedule": "vp-sde", "prediction": "v"},
        stages=[{**tiny.stages[1].model_dump(), "steps": 3}],
    )
    assert train(recipe, tmp_path / "run").finished
    text = capsys.readouterr().out
    for line in (
        "positions interpolated from 4x4 to 8x8",
        "left fresh: label_embed",
        "schedule cosine -> vp-sde",
        "prediction x0 -> v",
    ):
        assert line in text


def test_stages_may_have_unlike_schedules(tiny, changed, tmp_path):
    """A DDPM primer tuned under the VP-SDE, in one recipe (Table 2)."""
    first = {**tiny.stages[0].model_dump(), "schedule": "linear"}
    diffusion = {**tiny.diffusion.model_dump(), "schedule": "vp-sde"}
    run = tmp_path / "run"
    recipe = changed(stages=[first, tiny.stages[1].model_dump()], diffusion=diffusion)
    train(recipe, run, show=False)
    for name in (f"{run}@hide", run):
        images = generate(load_model(name).trained, Sampling(sampler="ddpm", steps=5), [0, 1])
        assert images.shape == (2, 8, 8, 1) and images.std() > 0
    assert load_model(f"{run}@hide").trained.diffusion.schedule == "linear"
    assert load_model(f"{run}@show").trained.diffusion.schedule == "vp-sde"
    other = [{**first, "schedule": None}, tiny.stages[1].model_dump()]
    train(changed(stages=other, diffusion=diffusion), tmp_path / "other", show=False)
    ends = [
        weights(folder / "checkpoints" / "step-00000006") for folder in (run, tmp_path / "other")
    ]
    assert not torch.equal(ends[0]["head.weight"], ends[1]["head.weight"])


def test_a_finished_models_schedule_is_that_of_the_last_stage(tiny, changed, tmp_path):
    last = {**tiny.stages[1].model_dump(), "schedule": "vp-sde"}
    recipe = changed(stages=[tiny.stages[0].model_dump(), last])
    result = train(recipe, tmp_path / "run", show=False)
    save_pipeline(pipeline_of_run(result.ema, recipe), tmp_path / "run" / "model")
    for name in ("run", "run@show"):
        assert load_model(f"{tmp_path}/{name}").trained.diffusion.schedule == "vp-sde"


def test_an_init_counts_where_no_checkpoint_is_whole(tiny, changed, source_run, tmp_path):
    """A damaged first checkpoint must not make the run start from random weights instead."""
    recipe = changed(init=str(source_run))
    once, again = tmp_path / "once", tmp_path / "again"
    train(recipe, once, show=False)
    damaged = again / "checkpoints" / "step-00000003"
    damaged.mkdir(parents=True)
    (again / "checkpoints" / "latest").write_text("step-00000003\n")
    with pytest.raises(ValueError, match="none of the checkpoints in .* remove them to begin anew"):
        train(recipe, again, show=False)
    assert [*again.iterdir()] == [again / "checkpoints"]
    shutil.rmtree(damaged)
    train(recipe, again, show=False)
    name = "checkpoints/step-00000011"
    first, second = weights(once / name), weights(again / name)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_primer_is_the_stage_before_the_one_that_is_asked(tiny, changed, tmp_path):
    stage = tiny.stages[1].model_dump()
    masks = [{"kind": "patch", "rate": 0.9}, {"kind": "patch", "rate": 0.5}, {}]
    stages = [{**stage, "name": n, "mask": m} for n, m in zip("abc", masks, strict=True)]
    train(changed(stages=stages), tmp_path, show=False)
    for name, primer in (("c", 10), ("b", 5)):
        weak = load_weak(load_model(f"{tmp_path}@{name}").location, "primer")
        assert weak.location.folder.name == f"step-{primer:08d}"
    with pytest.raises(ValueError, match="first stage, before which there is no primer"):
        load_weak(load_model(f"{tmp_path}@a").location, "primer")


def test_three_stages_run_in_order(tiny, changed, tmp_path):
    stage = tiny.stages[1].model_dump()
    stages = [
        {**stage, "name": "a", "mask": {"kind": "patch", "rate": 0.9}},
        {**stage, "name": "b", "mask": {"kind": "patch", "rate": 0.5}},
        {**stage, "name": "c"},
    ]
    train(changed(stages=stages), tmp_path, show=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    hidden = {line["stage"]: line["hidden"] for line in lines}
    assert hidden == {"a": 14 / 16, "b": 0.5, "c": 0.0}
    settings = Sampling(steps=4, guidance={"kind": "autoguidance"})
    loaded = load_model(tmp_path)
    weak = load_weak(loaded.location, "primer")
    assert weak.location.folder.name == "step-00000010"  # the end of the stage before the last
    images = generate(loaded.trained, settings, [0, 1], weak=weak.trained)
    assert images.shape == (2, 8, 8, 1) and images.std() > 0


def test_a_part_of_the_images_is_the_same_everywhere():
    def subset(**settings) -> list[int]:
        return training_subset(1000, Data(**settings)).tolist()

    assert subset() == list(range(1000))
    tenth, hundredth = subset(fraction=0.1), subset(fraction=0.01)
    assert len(tenth) == 100 and len(hundredth) == 10 and set(hundredth) <= set(tenth)
    assert hundredth == [15, 17, 65, 106, 189, 318, 677, 785, 825, 849]
    assert subset(fraction=0.1, limit=10) == hundredth == subset(limit=10)
    assert subset(fraction=0.01, subset_seed=1) != hundredth
    assert len(subset(fraction=1e-9)) == 1 and len(subset(limit=5000)) == 1000


def test_training_sees_its_part_alone(tiny, changed, tmp_path, capsys, monkeypatch):
    from maskdm.training import trainer

    recipe = changed(data={**tiny.data.model_dump(), "limit": 5})
    allowed = {
        image.tobytes()
        for image in np.asarray(open_store(recipe.data).images)[training_subset(1797, recipe.data)]
    }
    seen = set()

    def watched(images, *arguments):
        seen.update(image.numpy().tobytes() for image in images)
        return draw_batch(images, *arguments)

    monkeypatch.setattr(trainer, "draw_batch", watched)
    train(recipe, tmp_path)
    assert seen == allowed
    assert "5 of 1,797 images" in capsys.readouterr().out


def test_labels_are_hidden_at_their_rate(tiny, changed):
    recipe: Recipe = changed(
        model={**tiny.model.model_dump(), "num_classes": 3, "label_dropout": 0.25}
    )
    images = torch.zeros(2000, 8, 8, 1, dtype=torch.uint8)
    labels = torch.arange(2000) % 3
    schedule = load_schedule(recipe)
    batch = draw_batch(images, labels, recipe, recipe.stages[0], schedule, step=0)
    hidden = batch.labels == 3
    assert hidden.float().mean() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(batch.labels[~hidden], labels[~hidden])
    assert build_model(recipe).label_embed.weight.shape[0] == 4
    kept = changed(model={**recipe.model.model_dump(), "label_dropout": 0.0})
    batch = draw_batch(images, labels, kept, kept.stages[0], schedule, step=0)
    assert torch.equal(batch.labels, labels)
    assert build_model(kept).label_embed.weight.shape[0] == 3


def load_schedule(recipe: Recipe):
    from maskdm.diffusion.schedule import schedule_of

    return schedule_of(recipe.diffusion, recipe.data.size)
