"""What a run costs is said before it begins, and is what it then costs."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from maskdm.cli import main
from maskdm.diffusion.schedule import make_schedule
from maskdm.models.build import build_model
from maskdm.plan import make_plan, planned_run
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe
from maskdm.settings import changed
from maskdm.training.costs import costs_of
from maskdm.training.gpus import GPUS, Gpus
from maskdm.training.planning import RunOptions
from maskdm.training.ready import forward_and_backward
from maskdm.training.speed import Speed
from maskdm.training.step import draw_batch

PEAK_OF_A_RUN = """
import gc, json, sys
import maskdm, torch
from maskdm.plan import make_plan
from maskdm.recipe import Recipe
from maskdm.recipe_files import load_recipe
from maskdm.settings import changed
from maskdm.training.speed import Speed
from maskdm.training.trainer import train

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

def recipe(size):
    mask = {"kind": "patch", "rate": 0.5}
    stage = {"name": "a", "mask": mask, "steps": 3, "batch_size": size, "lr": 1e-3}
    return Recipe(
        data={"source": "faces:64", "size": 32},
        model={"patch_size": 4, "embed_dim": 160, "depth": 7, "num_heads": 5},
        diffusion={"schedule": "cosine"}, stages=[stage], num_previews=0, evaluate_every=0,
    )

train(recipe(1), sys.argv[1] + "/first", show=False)  # what every run needs once
plan = make_plan(recipe(64), "here", Speed((1.0,), 1.0), 64, 64)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
train(recipe(64), sys.argv[1] + "/second", show=False)
print(json.dumps([plan.memory.total, memory("VmHWM") - before]))
"""


def test_flops_are_those_that_pytorch_counts(tiny):
    model = build_model(tiny)
    costs = costs_of(tiny, model)
    for stage, cost in zip(tiny.stages, costs.stages, strict=True):
        images = torch.zeros((stage.batch_size, 8, 8, 1), dtype=torch.uint8)
        batch = draw_batch(images, None, tiny, stage, make_schedule("cosine"), 0)
        # The counter knows the attention that is made of matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            forward_and_backward(model, batch)
        # The gradient of the noisy patches is not needed: the plan counts it nevertheless.
        embedding = 2 * batch.x0.numel() * 16
        assert cost.flops / stage.steps == pytest.approx(
            counter.get_total_flops() + embedding, rel=0.01
        )
        assert cost.images == stage.steps * 8 and cost.seconds is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_within_15_percent_of_the_rise_of_the_peak(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_RUN, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    planned, real = json.loads(done.stdout.splitlines()[-1])
    assert planned == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_what_torch_allocates(tmp_path, recomputed):
    """Its own count: of freed memory, which recomputing leaves much of, the system sees little."""
    mask = {"kind": "patch", "rate": 0.5}
    stage = {"name": "a", "mask": mask, "steps": 3, "batch_size": 64, "lr": 1e-3}
    recipe = Recipe(
        data={"source": "faces:64", "size": 32},
        model={"patch_size": 4, "embed_dim": 160, "depth": 7, "num_heads": 5},
        stages=[{**stage, "activation_checkpointing": recomputed}],
    )
    model = build_model(recipe)
    if recomputed:
        again = functools.partial(checkpoint, use_reentrant=False)
        model.enable_gradient_checkpointing(again)
    images = torch.zeros((64, 32, 32, 3), dtype=torch.uint8)
    batch = draw_batch(images, None, recipe, recipe.stages[0], make_schedule("cosine"), 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        model(batch.x0, batch.visible, batch.t).square().sum().backward()
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    total = [one["args"]["Total Allocated"] for one in events if one.get("name") == "[memory]"]
    memory = make_plan(recipe, "here", Speed((1.0,), 1.0), 64, 64).memory
    real = max(total) - total[0]
    assert memory.activations + memory.gradients == pytest.approx(real, rel=0.15)


@pytest.mark.gpu
def test_memory_on_a_gpu_is_within_15_percent(tmp_path):
    stage = {"name": "a", "steps": 3, "batch_size": 64, "lr": 1e-3}
    recipe = Recipe(
        data={"source": "faces:64", "size": 64},
        model={"embed_dim": 384, "depth": 11, "num_heads": 6},
        stages=[stage],
        num_previews=0,
        evaluate_every=0,
        compile="off",
        precision="fp32",
    )
    from maskdm.training.trainer import train

    plan = make_plan(recipe, "here", Speed((1.0,), 1.0), 64, 64)
    torch.cuda.reset_peak_memory_stats()
    train(recipe, tmp_path / "run", show=False)
    assert plan.memory.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_a_gpus_hours_follow_from_its_peak():
    recipe = Recipe(
        data={"source": "nowhere", "size": 64},
        stages=[{"name": "a", "steps": 1000, "batch_size": 256, "lr": 1e-3}],
        evaluation={"quick_num": 0},
        precision="fp16",
    )
    one = planned_run(recipe, RunOptions(), "v100", 1, 0.22).costs
    assert one.seconds == pytest.approx(one.flops / (125e12 * 0.22))
    assert planned_run(recipe, RunOptions(), "a100", 8, 0.22).costs.seconds == pytest.approx(
        one.seconds * 125 / 312 / 8
    )
    assert one.stages[0].epochs is None and set(GPUS) >= {"v100", "a100", "h100", "h200"}


def test_a_budget_in_hours_can_be_planned_for_another_machine(tiny):
    stage = {"name": "a", "share": 1, "batch_size": 256, "lr": 1e-3}
    recipe = Recipe(data={"source": "nowhere", "size": 64}, stages=[stage], budget={"hours": 2})
    plan = planned_run(recipe, RunOptions(), "h100", 2)
    assert plan.costs.total_seconds == pytest.approx(7200, rel=0.01)
    assert Gpus("h100", 2).flops_per_sec() == pytest.approx(2 * 0.3 * 989e12)


def plan_in_json(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_small_steps_on_a_gpu_take_as_long_as_their_launches(capsys):
    """Measured beside an H200: for 5 blocks with Muon 21 ms, or 2.4 as one graph."""
    faces = ["photos32", "--data.source", "faces:2000@32", "--gpu", "h100"]
    plan = plan_in_json(capsys, *faces, "--epochs", "1000")
    for stage in plan["costs"]["stages"]:
        assert stage["seconds"] / stage["steps"] == pytest.approx(0.0025)  # 5 blocks
    text = " ".join(plan["warnings"])
    assert "steps are bound by launches" in text and "--compile" not in text
    compiled = plan_in_json(capsys, *faces, "--epochs", "1000", "--compile", "on")
    assert "or --compile auto uses the GPU better" in " ".join(compiled["warnings"])
    for stage in compiled["costs"]["stages"]:
        assert 0.015 < stage["seconds"] / stage["steps"] < 0.020
    hour = plan_in_json(capsys, *faces, "--hours", "1", "--compile", "on")
    assert sum(stage["steps"] for stage in hour["costs"]["stages"]) < 3600 / 0.015
    assert hour["costs"]["total_seconds"] == pytest.approx(3600, rel=0.01)

    size_s = ["photos64", "--data.source", "faces:99@64", "--gpu", "h200", "--images", "640000"]
    size_s += ["--model.size", "maskdm-s", "--model.kind", "uvit"]
    ms = {}
    for name, more in {
        "compiled": ["--compile", "on"],
        "eager": ["--compile", "off"],
        "auto": [],
        "auto on two": ["--gpus", "2"],
        "in fp16": ["--precision", "fp16"],
        "micro-batches": ["--stages.all.micro-batch-size", "16"],
        "large": ["--stages.all.batch-size", "1024"],
    }.items():
        plan = plan_in_json(capsys, *size_s, *more)
        stage = plan["costs"]["stages"][0]
        ms[name] = 1000 * stage["seconds"] / stage["steps"]
        bound = "bound by launches" in " ".join(plan["warnings"])
        assert bound == (name not in ("auto", "large")), name
    large = plan_in_json(capsys, *size_s, "--stages.all.batch-size", "80")
    assert "or --compile graphs" in " ".join(large["warnings"])  # whole images: 5.9 TFLOP
    assert 26 < ms["compiled"] < 34 < ms["eager"] < 40
    assert ms["auto"] == pytest.approx(1000 * 64 * 35.454e9 / (0.3 * 989e12), rel=0.02)
    assert ms["auto on two"] == pytest.approx(ms["compiled"]) == pytest.approx(ms["in fp16"])
    assert ms["auto"] < ms["micro-batches"] < 13
    assert ms["large"] == pytest.approx(1000 * 1024 * 35.454e9 / (0.3 * 989e12), rel=0.02)


@pytest.mark.parametrize(
    ("flags", "batch"),
    [
        ("", 8),
        ("--stages.all.batch-size 64", 64),
        ("--stages.all.batch-size=64", 64),
        ("--stages.all.smallest-batch 32", 32),
        ("--stages.all.batch-size 64 --stages.all.smallest-batch 16", 16),
    ],
)
def test_a_budget_of_few_steps_leaves_a_batch_that_is_given_as_it_is(capsys, flags, batch):
    short = "photos32 --data.source faces:2000@32 --gpu h100 --images 6400"
    plan = plan_in_json(capsys, *short.split(), *flags.split())
    assert {stage["images"] / stage["steps"] for stage in plan["costs"]["stages"]} == {batch}
    assert plan["costs"]["stages"][0]["images"] < 6400


def test_a_gpus_hours_choose_a_model_that_its_steps_can_teach(capsys):
    """100 tokens a parameter: in steps that launches bound, larger models see no more of them."""
    many = ["photos32", "--data.source", "faces:50000@32", "--gpu", "h100", "--hours", "1"]
    many += ["--compile", "on"]
    plan = plan_in_json(capsys, *many)
    tokens = sum(stage["tokens"] for stage in plan["costs"]["stages"])
    assert plan["num_params"] * 80 < tokens
    size = "--model.size mini"
    assert plan["recipe"]["model"]["depth"] == 7 and size in " ".join(plan["warnings"])
    assert size not in " ".join(plan_in_json(capsys, *many, *size.split())["warnings"])


def test_drawing_on_a_gpu_takes_as_long_as_its_launches(capsys):
    """A thousand images at a time, of 25 steps and 5 blocks of 0.8 ms."""
    plan = plan_in_json(
        capsys, "photos32", "--data.source", "faces:99@32", "--gpu", "h100", "--epochs", "500"
    )
    assert plan["costs"]["image_seconds"] == pytest.approx(25 * 5 * 0.8e-3 / 1024, rel=0.01)


@pytest.mark.parametrize(("gpu", "fp32_peak", "peak"), [("t4", 8.1e12, 65e12),
                                                        ("v100", 15.7e12, 125e12)])  # fmt: skip
def test_gpus_without_bf16_are_planned_in_the_precision_that_training_chooses(
    capsys, gpu, fp32_peak, peak
):
    words = ["celeba64", "--gpu", gpu]
    auto, fp16 = (plan_in_json(capsys, *words, *more) for more in ([], ["--precision", "fp16"]))
    flops = auto["costs"]["flops"]
    assert auto["costs"]["seconds"] == pytest.approx(flops / (0.3 * fp32_peak))
    assert fp16["costs"]["seconds"] == pytest.approx(flops / (0.3 * peak))
    # Trained in fp16, it draws as `sample` does: in bf16 or fp32.
    assert fp16["costs"]["image_seconds"] == auto["costs"]["image_seconds"]
    assert auto["memory"]["activations"] == pytest.approx(2 * fp16["memory"]["activations"])
    hint = "--precision fp16 is faster"
    assert hint in " ".join(auto["warnings"]) and hint not in " ".join(fp16["warnings"])
    assert "fp32" in auto["machine"] and "fp16" in fp16["machine"]
    fp32 = plan_in_json(capsys, *words, "--precision", "fp32")
    assert fp32["costs"]["seconds"] == auto["costs"]["seconds"]
    assert "the times are those of bf16" not in " ".join(fp32["warnings"])
    a100 = plan_in_json(capsys, "celeba64", "--gpu", "a100")
    assert "bf16" in a100["machine"] and hint not in " ".join(a100["warnings"])


def test_what_looks_unwise_is_said(tiny):
    stage = {"name": "a", "steps": 10_000, "batch_size": 64, "lr": 1e-3, "ema": {"decay": 0.9999}}
    recipe = Recipe(data={"source": "digits", "size": 8, "channels": 1, "limit": 50},
                    model={"patch_size": 2, "embed_dim": 64}, stages=[stage])  # fmt: skip
    plan = make_plan(recipe, "here", Speed((1.0,), 0.1), 1797, 50)
    text = " ".join(plan.warnings)
    assert "50 images and a network of" in text and "is seen 12,800 times" in text
    assert "a batch of 64 images is more than the 50 that there are" in text
    assert "keeps 37 % of the first weights over 10,000 steps: try --stages.0.ema" in text
    small = make_plan(tiny, "here", Speed((1.0, 1.0), 0.1), 1797, 1797)
    assert [warning[:11] for warning in small.warnings] == ["stage hide:", "stage show:"]


def test_the_command_prints_a_table_or_json(capsys, monkeypatch):
    monkeypatch.setattr("maskdm.training.speed._step_sec", lambda *_: 0.01)
    monkeypatch.setattr("maskdm.training.speed.seconds_of_answer", lambda *_: 0.001)
    assert main(["plan", "digits"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("stage") and "pre-train" in text and "30 s" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.splitlines()[-1] == "next      maskdm train digits"
    flags = ["--shrink", "0.5", "--data.source", "digits", "--stages.all.lr", "1e-3"]
    assert main(["plan", "digits", *flags[:2], "--gpu", "h200", "--gpus=2", *flags[2:]]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == f"next      maskdm train digits {' '.join(flags)}"
    assert main(["plan", "digits", "--flops", "1e12", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["costs"]["flops"] == pytest.approx(1e12, rel=0.01)
    assert facts["disk"]["store"] == 1797 * 64
    for flags, message in (
        (["--gpu", "h1000"], "unknown GPU 'h1000': did you mean h100?"),
        (["--gpu", "h100", "--gpus", "0"], "--gpus 0: at least one"),
        (["--gpu", "h100", "--share", "0"], "--share 0: a part of the GPU's peak"),
        (["--gpu", "h100", "--share", "22"], "--share 22: a part of the GPU's peak"),
        (["--gpus", "8"], "--gpus and --share are of GPUs that are not here: add --gpu"),
        (["--flops", "+1e12"], "give the budget in all, without a plus"),
    ):
        assert main(["plan", "digits", *flags]) == 2
        assert message in capsys.readouterr().err


def test_what_saves_memory_is_planned():
    recipe = changed(load_recipe("celebahq256"), precision="fp16")
    whole, auto, again = (
        planned_run(
            changed(recipe, stages=[stage.model_dump() | how for stage in recipe.stages]),
            RunOptions(),
            "t4",
        )
        for how in (
            {},
            {"micro_batch_size": "auto"},
            {"micro_batch_size": "auto", "activation_checkpointing": True},
        )
    )
    assert whole.memory.total > GPUS["t4"].memory > auto.memory.total
    assert "micro-batch-size auto" in " ".join(whole.warnings)
    assert not [one for one in auto.warnings if "a step needs" in one]
    # Auto fills what there is: recomputing blocks lets more images in at a time.
    assert auto.memory.activations < GPUS["t4"].memory
    assert again.memory.total < GPUS["t4"].memory
    fp32 = planned_run(changed(recipe, precision="fp32"), RunOptions(), "h100")
    assert fp32.memory.activations == pytest.approx(2 * whole.memory.activations)
    assert "the times are those of bf16" in " ".join(fp32.warnings)
