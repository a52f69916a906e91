"""`maskdm plan`."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import tyro

from maskdm.commands.common import DONE, JsonFlag, LengthFlags, NoPrefix, RecipeName, quiet
from maskdm.commands.train import AS_THE_RECIPE
from maskdm.recipe import Recipe
from maskdm.words import about, duration, flops_text, images_text, size_text, wrapped

if TYPE_CHECKING:
    from maskdm.plan import Plan


def plan(
    recipe: RecipeName,
    *,
    gpu: Annotated[str | None, quiet(metavar="GPU")] = None,
    gpus: int = 1,
    share: Annotated[float | None, quiet(metavar="FLOAT")] = None,
    length: Annotated[LengthFlags, NoPrefix] = AS_THE_RECIPE,
    settings: Annotated[Recipe, NoPrefix],
    json_output: JsonFlag = False,
    training: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> int:
    """Say what a run will cost, with the flags that `maskdm train` takes; train nothing.

    Images, compute and time of each stage, memory, disk, the cost of sampling and of evaluating,
    and what looks unwise. On this machine a few steps are timed; with --gpu the time follows from
    the GPU's peak, and from the launches of its kernels where steps are small.

    Args:
        recipe: name of a packaged recipe, a YAML file, or a run's folder.
        gpu: t4, v100, l4, rtx3090, rtx4090, rtx5090, a100, h100, h200 or b200, instead of this
            machine.
        gpus: how many of them.
        share: of the GPU's peak that training reaches. Default: 0.3; the paper's runs had 0.22.
        json_output: print the plan as JSON: seconds, bytes, FLOPs.
        training: the arguments that train it.
    """
    settings = settings.checked()

    from maskdm.plan import planned_run
    from maskdm.training.planning import RunOptions

    done = planned_run(settings, RunOptions.of(**asdict(length)), gpu, gpus, share)
    if json_output:
        print(json.dumps(done.as_json()))
    else:
        print("\n".join(plan_text(done)))
        if training:
            print(f"next      maskdm train {shlex.join(training)}")
    return DONE


def plan_text(plan: Plan) -> list[str]:
    """A plan in lines for people."""
    costs, memory, disk = plan.costs, plan.memory, plan.disk
    rows = [["stage", "hidden", "steps", "images", "epochs", "tokens", "FLOPs", "time"]]
    for stage in costs.stages:
        rows.append(
            [
                stage.name,
                f"{100 * stage.hidden:.0f} %",
                f"{stage.steps:,}",
                images_text(stage.images),
                "?" if stage.epochs is None else f"{stage.epochs:,.3g}",
                images_text(stage.tokens),
                flops_text(stage.flops).removesuffix("FLOP").strip(),
                duration(stage.seconds or 0),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    state = (
        f"weights {size_text(memory.weights)}, gradients {size_text(memory.gradients)}, optimizer "
        f"{size_text(memory.optimizer)}, average {size_text(memory.average)}, activations "
        f"{size_text(memory.activations)}"
    )
    store = "" if disk.store is None else f"packed images {size_text(disk.store)}, "
    total = duration(costs.total_seconds or 0)
    facts = {
        "in all": f"{total} on {plan.machine}: training {duration(costs.seconds or 0)} "
        f"({flops_text(costs.flops)}), previews {duration(costs.preview_seconds or 0)}, measuring "
        f"{duration(costs.measuring_seconds or 0)}",
        "model": f"{plan.num_params / 1e6:.3g} M parameters, {plan.num_patches} tokens an image",
        "memory": f"{size_text(memory.total)}: {state}",
        "disk": f"{store}checkpoints {size_text(disk.checkpoints)}, model {size_text(disk.model)}, "
        f"images of evaluate {size_text(disk.evaluation)}",
        "sampling": f"{about(costs.image_seconds or 0)} an image by {plan.recipe.sampling.steps} "
        f"steps of {plan.recipe.sampling.sampler}; maskdm evaluate draws "
        f"{plan.recipe.evaluation.num:,}: {duration(costs.evaluate_seconds or 0)}",
    }
    if costs.probing_flops:
        facts["forks"] = (
            f"at most {flops_text(costs.probing_flops)} of the training, to find plateaus"
        )
    lines.append("")
    for title, text in facts.items():
        lines += wrapped(text, f"{title:10}", 80)
    for warning in plan.warnings:
        lines += wrapped(warning, "warning   ", 80)
    return lines
