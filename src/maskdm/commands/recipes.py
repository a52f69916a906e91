"""`maskdm recipes`."""

from __future__ import annotations

from typing import Annotated

import tyro

from maskdm.commands.common import DONE, quiet
from maskdm.recipe_files import recipe_names, recipe_text, whole_text

OptionalName = Annotated[str | None, tyro.conf.Positional, quiet(metavar="[NAME]")]


def recipes(name: OptionalName = None) -> int:
    """List the packaged recipes, or print one (save it to a file, change it, and train that).

    Args:
        name: the recipe to print.
    """
    if name is not None:
        print(whole_text(name), end="")
        return DONE
    width = max(map(len, recipe_names()))
    for known in recipe_names():
        comment = recipe_text(known).splitlines()[0].removeprefix("# ")
        print(f"{known:{width}} {comment}")
    return DONE
