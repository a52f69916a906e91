"""What a run costs is said before it begins, and is what it then costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskdm.cli import main
from maskdm.diffusion.schedule import make_schedule
from maskdm.models.build import build_model
from maskdm.plan import GPUS, Gpus, make_plan, planned_run
from maskdm.recipe import Recipe
from maskdm.training.costs import costs_of
from maskdm.training.planning import RunOptions
from maskdm.training.ready import forward_and_backward
from maskdm.training.speed import Speed
from maskdm.training.step import draw_batch

PEAK_OF_A_RUN = """
import gc, json, sys
import maskdm, torch
from maskdm.plan import make_plan
from maskdm.recipe import Recipe
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
    assert main(["plan", "digits", "--gpu", "h1000"]) == 2
    assert "unknown GPU 'h1000': did you mean h100?" in capsys.readouterr().err
