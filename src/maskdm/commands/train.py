"""`maskdm train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from maskdm.commands.common import DONE, STOPPED, RecipeName, changed, is_main_process
from maskdm.recipe import Recipe


def train(
    recipe: RecipeName,
    *,
    out: Path,
    settings: Annotated[Recipe, tyro.conf.arg(name="")],
    resume: Literal["auto", "never"] = "auto",
) -> int:
    """Run a recipe's stages. Every setting of the recipe is a flag, and the flag wins.

    On a folder that holds an unfinished run of the same settings it continues that run, exactly.
    Exit codes: 0 done, 1 failed, 2 wrong input, 3 stopped by a signal after saving.

    Args:
        recipe: name of a packaged recipe (`maskdm recipes`), or a YAML file.
        out: the run's folder.
        resume: auto continues a run in the folder; never refuses one.
    """
    settings = settings.checked()

    from accelerate import Accelerator

    from maskdm.diffusion.schedule import schedule_of
    from maskdm.evaluation.quick import QuickLook
    from maskdm.hub import pipeline_of_run, save_pipeline
    from maskdm.images.output import image_grid, save_sheet, with_caption
    from maskdm.images.store import Store
    from maskdm.models.trained import TrainedModel
    from maskdm.report import plot_loss
    from maskdm.sampling.generate import generate_on_all_ranks
    from maskdm.sampling.samplers import refuse_settings
    from maskdm.training import trainer
    from maskdm.training.set_points import QualityLine, quality_parts

    # What could not be sampled when it is trained is refused now.
    refuse_settings(schedule_of(settings.final_diffusion, settings.data.size), settings.sampling)
    # Fast, and possible at every stage: autoguidance, say, is not before there is a primer.
    for_previews = changed(
        settings.sampling,
        sampler="dpm-solver",
        steps=settings.preview_steps,
        spacing="uniform",
        eta=0.0,
        guidance="none",
    )

    def preview(
        accelerator: Accelerator, trained: TrainedModel, file: Path, line: QualityLine
    ) -> None:
        images = generate_on_all_ranks(trained, for_previews, settings.num_previews)
        if accelerator.is_main_process:
            title = f"{line['stage']}, step {line['step']:,}"
            known = {k: v for k, v in line.items() if not k.startswith("kid")}  # space is scarce
            parts = [part.replace("+-", "±") for part in quality_parts(known)]
            save_sheet(with_caption(image_grid(images), title, parts), file)

    def make_measure(store: Store) -> QuickLook:
        return QuickLook(settings, store, for_previews)

    drawing = preview if settings.num_previews else None
    result = trainer.train(settings, out, resume, drawing, make_measure)
    if not result.finished:
        return STOPPED
    if not is_main_process():
        return DONE
    save_pipeline(pipeline_of_run(result.ema, settings), out / "model")
    print(f"model   {out / 'model'}")
    print(f"loss    {plot_loss(out)}")
    for file in sorted((out / "samples").glob("step-*.png"))[-1:]:
        print(f"preview {file}")
    print(f"next    maskdm sample {out} --num 64 --out grid.png")
    return DONE
