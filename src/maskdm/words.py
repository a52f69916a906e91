"""How this package puts things into words: counts, sizes, times, errors, names, and the way out."""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NUM_LISTED = 5  # names in a message
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def counted(num: int, one: str, many: str | None = None) -> str:
    """`1 image`, `2 images`, `1,234 images`."""
    return f"{num:,} {one if num == 1 else many or one + 's'}"


def listed(names: Iterable[object], most: int = NUM_LISTED) -> str:
    """The first few of many names: `a, b, c and 3 more`."""
    known = [printable(str(name)) for name in names]
    more = f" and {len(known) - most:,} more" if len(known) > most else ""
    return ", ".join(known[:most]) + more


def suggestion(name: str, known: Iterable[str], most: int = 20) -> str:
    """What to write instead of an unknown name: `did you mean ddim?`, or the known names."""
    spelt = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), spelt, n=1)
    return f"did you mean {spelt[near[0]]}?" if near else f"known: {listed(spelt.values(), most)}"


def printable(name: str) -> str:
    """A file's name for a terminal: bytes that are not UTF-8 and control characters become escapes.

    The latter would change the terminal's colours, say, or break the line.
    """
    text = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """As `printable`, but line breaks and tabs stay."""
    parts = re.split(r"([\n\t])", text)
    return "".join(part if part in "\n\t" else printable(part) for part in parts)


def one_line(error: BaseException | str, width: int = 0) -> str:
    """The text of an error without line breaks, shortened to `width` characters unless that is 0.

    An error without a text gives the name of its class.
    """
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return textwrap.shorten(text, width, placeholder=" ...") if width else text


def wrapped(text: str, start: str = "", width: int = 100) -> list[str]:
    """Lines of at most `width` columns; the first begins with `start`, the others below its end.

    Words, file names among them, stay whole.
    """
    indent = " " * len(start)
    return textwrap.wrap(
        text, width, initial_indent=start, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def size_text(num_bytes: float) -> str:
    """`12.3 MB`."""
    return prefixed(num_bytes, ("bytes", "kB", "MB", "GB", "TB"))


def flops_text(flops: float) -> str:
    """`3.7 TFLOP`."""
    return prefixed(flops, [f"{prefix}FLOP" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")])


def images_text(num: float) -> str:
    """`1.28 M`."""
    return prefixed(num, ("", "k", "M", "G")).rstrip()


def prefixed(value: float, units: Sequence[str]) -> str:
    """Three digits and a unit, each of which is a thousand of the one before."""
    power = 0
    while power + 1 < len(units) and float(f"{value:.3g}") >= 1000:
        value, power = value / 1000, power + 1
    return f"{value:,.0f} {units[power]}" if value >= 1000 else f"{value:.3g} {units[power]}"


def clock(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def about(seconds: float) -> str:
    """`less than 1 s`, `about 3 s`, `about 12 min`, `about 1.5 h`."""
    if seconds < 1:
        return "less than 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def duration(seconds: float) -> str:
    """`12 s`, `3.4 min`, `5.2 h`, `12 days`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 99.5 * 3600 else f"{seconds / 86400:.3g} days"


def figure(value: float) -> str:
    """A figure with four significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def decimals_of(errors: Iterable[float]) -> int | None:
    """Decimals that show two digits of the smallest error; None where there is none above 0."""
    known = [error for error in errors if error > 0]
    if not known:
        return None
    return min(8, max(0, 1 - math.floor(math.log10(min(known)))))


def fixed(value: float, decimals: int | None) -> str:
    """A figure with so many decimals; None = four significant digits."""
    if decimals is None:
        return f"{value:.4g}"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0: no minus before a zero


def with_error(value: float, error: float | None, decimals: int | None = None) -> str:
    """`9.3 +- 1.2`, by default to the second digit of the error; the value alone without one."""
    if error is None:
        return fixed(value, decimals)
    decimals = decimals_of([error]) if decimals is None else decimals
    return f"{fixed(value, decimals)} +- {fixed(error, decimals)}"


@dataclass(frozen=True)
class Cost:
    """A way to count what training has cost.

    Attributes:
        key: of a line of metrics.jsonl or quality.jsonl, and of a record's training.
        title: on an axis of a plot.
        unit: in a sentence: `2 times fewer images`.
        text: an amount in words.
    """

    key: str
    title: str
    unit: str
    text: Callable[[float], str]


COSTS = {
    "images": Cost("images", "images seen", "fewer images", images_text),
    "flops": Cost("flops", "cost of training", "fewer FLOPs", flops_text),
    "time": Cost("elapsed_sec", "time of training", "less time", clock),
}
