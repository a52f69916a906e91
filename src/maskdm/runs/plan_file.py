"""RUN/plan.json: what a run was expected to cost when it was started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskdm.files import write_text

PLAN = "plan.json"


def write_plan(run_dir: Path, plan: dict[str, Any]) -> None:
    """Writes a plan, in place of that of the start before. Raises OSError on a full disk."""
    write_text(run_dir / PLAN, json.dumps(plan, indent=1) + "\n")


def read_plan(run_dir: Path) -> dict[str, Any] | None:
    """The plan of the newest start; None where there is none, or it is damaged.

    num_params, num_patches    of the model
    num_images, num_train      of the source, and those trained on
    num_held_out               images kept out of training
    num_classes                of the source, whether they are used or not
    stages                     name, hidden, steps, images, epochs, tokens, flops, seconds (null
                               where this machine's speed had not been measured)
    flops, seconds             of all of them
    warnings                   what looked unwise, in sentences
    """
    try:
        plan = json.loads((run_dir / PLAN).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(plan, dict) and isinstance(plan.get("stages"), list)
    return plan if is_whole else None
