"""What may change in a run that goes on: settings that change no weight, more steps, and on request
those of the stages that are not over."""

from __future__ import annotations

from collections.abc import Container

from maskdm.recipe import Recipe, Stage
from maskdm.recipe_files import Change, differences
from maskdm.runs.checkpoint import Progress
from maskdm.settings import changed

# Settings that change no weight, but for rounding: they may change whenever a run is continued.
FREE = (
    "log_every checkpoint_every checkpoint_minutes keep_checkpoints keep_every preview_every "
    "num_previews preview_steps evaluate_every log_to sampling evaluation compile"
).split()
FREE_OF_STAGE = ("micro_batch_size", "activation_checkpointing")
# Settings of a stage that is not over, which change its weights: on request.
ON_REQUEST = "batch_size optimizer lr lr_schedule warmup betas weight_decay clip ema until".split()
LONGER = ("steps", "restarts", "warmup", "share")  # what `extended` changes


def accepted_changes(
    old: Recipe, new: Recipe, progress: Progress, on_request: bool
) -> list[Change]:
    """The settings in which a run's recipe and the one that continues it differ.

    The source of the images may have another name: their SHA-256 says that they are the same.

    Args:
        old, new: both planned.
        progress: of the run.
        on_request: whether settings may change that change the weights to come.

    Raises ValueError for changes that are not possible, or need a request; it says the way out.
    """
    changes = differences(old, new)
    refused = [
        str(one)
        for one in changes
        if one.name != "data.source" and not _is_accepted(one, old, new, progress, on_request)
    ]
    if not refused:
        return changes
    # Restarts follow from other settings, and nobody gives them.
    refused = [one for one in refused if ".restarts: " not in one] or refused
    possible = [one for one in changes if _is_accepted(one, old, new, progress, True)]
    way_out = "give the same settings to continue it, or name a new folder with --out"
    if not on_request and len(possible) == len(changes):
        way_out = "give the same settings to continue it, add --change to go on with these, or "
        way_out += "name a new folder with --out"
    raise ValueError(f"a run of another recipe ({'; '.join(refused)}): {way_out}")


def _is_accepted(
    change: Change, old: Recipe, new: Recipe, progress: Progress, on_request: bool
) -> bool:
    group, _, rest = change.name.partition(".")
    if group in FREE or group == "budget" or change.name == "data.resident":
        return True
    if group != "stages" or len(old.stages) != len(new.stages):
        return False
    number, _, setting = rest.partition(".")
    stage, name = int(number), setting.partition(".")[0]
    if name in FREE_OF_STAGE:
        return True
    if stage < progress.stage:
        return False
    if name in LONGER and old.stages[stage].steps < new.stages[stage].steps:
        return True
    if name == "steps":
        done = progress.stage_step if stage == progress.stage else 0
        return on_request and change.now > done
    return on_request and name in (*ON_REQUEST, "restarts")


def extended(old: Recipe, new: Recipe, progress: Progress) -> Recipe:
    """A run's new recipe, with what follows for its present stage from being longer or changed.

    A learning rate that has begun to decay begins anew, with a warm-up; a warm-up that was a part
    of the stage keeps its length.

    Args:
        old, new: both planned, with as many stages.
        progress: of the run.
    """
    number = progress.stage
    before, now = old.stages[number], new.stages[number]
    restarts = tuple(restart for restart in before.restarts if restart < now.steps)
    step = progress.stage_step
    begins_anew = now.lr != before.lr or now.lr_schedule != before.lr_schedule
    begins_anew = begins_anew or (now.steps > before.steps and has_decayed(before, step))
    if 0 < step < now.steps and begins_anew:
        restarts = (*(restart for restart in restarts if restart < step), step)
    warmup = now.warmup
    if restarts == before.restarts and now.steps != before.steps and warmup == before.warmup:
        warmup = before.warmup_steps if step else now.warmup
    stages = list(new.stages)
    stages[number] = changed(now, restarts=restarts, warmup=warmup)
    return changed(new, stages=tuple(stage.model_dump() for stage in stages))


def with_fixed_warmups(old: Recipe, new: Recipe, given: Container[str] = ()) -> Recipe:
    """A run's new recipe, whose warm-ups keep the steps that were fixed when their stages grew.

    Args:
        old, new: where a stage has grown in `extended`, the old one has a number of steps and the
            new one still a part of the stage.
        given: names of the settings that are to count as they are.
    """
    stages = [stage.model_dump() for stage in new.stages]
    for i, (row, own) in enumerate(zip(stages, old.stages, strict=False)):
        was_fixed = isinstance(own.warmup, int) and isinstance(row["warmup"], str)
        if was_fixed and row["steps"] >= own.steps and f"stages.{i}.warmup" not in given:
            row["warmup"] = own.warmup
    return changed(new, stages=stages)


def settled(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe with the real lengths of the stages that have ended at a plateau.

    Those are then stages of so many steps, so that the recipe trains the same without forks. What
    is settled already stays as it is.

    Args:
        recipe: of the run; stages without steps stay without.
        progress: of the run.
    """
    stages = [stage.model_dump() for stage in recipe.stages]
    for one in progress.plateaus:
        if one.stage + 1 >= len(stages) or stages[one.stage]["until"] == "steps":
            continue
        facts = {"until": "steps", "warmup": one.warmup, "probe_flops": one.probe_flops}
        stages[one.stage] |= facts
        for row, change in zip(stages[one.stage :], (-one.fewer, one.more), strict=False):
            row["steps"] = max(1, row["steps"] + change) if row["steps"] else 0
    return changed(recipe, stages=stages) if progress.plateaus else recipe


def has_decayed(stage: Stage, step: int) -> bool:
    """Whether the learning rate has begun to fall."""
    since = max([0, *(restart for restart in stage.restarts if restart <= step)])
    return stage.lr_schedule == "cosine" and step - since > stage.warmup_steps
