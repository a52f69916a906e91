"""Whether a model in training begins to know its training images better than others."""

from __future__ import annotations

from collections.abc import Sequence

from maskdm.runs.lines import Line

RISE = 1.02  # of the held-out loss, before it is called one


def rise_of_loss(lines: Sequence[Line]) -> str | None:
    """What to know where held-out images lose what training images gain; None where they don't.

    Args:
        lines: of quality.jsonl, the newest last.
    """
    # Of one stage: another may have another noise schedule, under which losses differ.
    known = [one for one in lines if "dense_loss" in one and one["stage"] == lines[-1]["stage"]]
    if len(known) < 2:
        return None
    best, last = min(known, key=lambda line: float(line["dense_loss"])), known[-1]
    rises = last["dense_loss"] > RISE * best["dense_loss"]
    if not rises or last["dense_loss_train"] >= best["dense_loss_train"]:
        return None
    return (
        f"the loss on held-out images has risen from {best['dense_loss']:.4g} at step "
        f"{best['step']:,} to {last['dense_loss']:.4g}, while that on training images fell: the "
        "model begins to memorise"
    )
