"""`maskdm push`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from maskdm.commands.common import (
    DONE,
    Run,
    load,
    quiet,
    sampling_text,
    say_how_long,
    say_note,
)
from maskdm.files import refuse_unwritable, whole_folder, write_text
from maskdm.runs.find import find_model
from maskdm.words import counted, one_line, size_text

if TYPE_CHECKING:
    from maskdm.runs.load import Loaded

Repository = Annotated[str, tyro.conf.Positional, quiet(metavar="OWNER/NAME")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
OptionalFolder = Annotated[Path | None, quiet(metavar="FOLDER")]
License = Annotated[str | None, quiet(metavar="NAME")]
File = Annotated[Path | None, quiet(metavar="FILE")]


def push(
    run: Run,
    repository: Repository,
    *,
    private: Switch = False,
    license: License = None,
    notes: File = None,
    num: int = 16,
    seed: int = 0,
    dry_run: OptionalFolder = None,
) -> int:
    """Upload a run's model to the Hugging Face Hub, with a card made from the run.

    The card has samples, data, recipe, cost, the evaluations of these weights with what they depend
    on, the check for copies, and how to use the model. Names of local folders are reduced to their
    last part; no training image is uploaded. `maskdm.load("owner/name")`, and every command that
    takes a RUN, then fetch it.

    Args:
        run: a run's folder, RUN@STAGE or a checkpoint.
        repository: where to; it is made unless it exists. Files of the same names are replaced.
        private: only you see it.
        license: the model's licence by its name on the Hub: apache-2.0, cc-by-4.0, other. Without
            it the card says that there is none.
        notes: Markdown for the card: what the images are, what the model is for, its limits.
        num: samples on the card.
        seed: of the samples.
        dry_run: write there what would be uploaded, and upload nothing.
    """
    from maskdm.export.hub import (
        SAMPLES,
        refuse_repository,
        refuse_without_login,
        stage_model,
        upload,
    )

    refuse_repository(repository)
    if num < 1:
        raise ValueError(f"--num {num}: at least one sample")
    written = _read(notes)
    if dry_run is not None:
        if dry_run.exists() and (not dry_run.is_dir() or any(dry_run.iterdir())):
            raise ValueError(f"--dry-run {dry_run} exists and is not an empty folder: name another")
        refuse_unwritable(dry_run, "--dry-run", is_folder=True)
    else:
        refuse_without_login()
    location = find_model(run, note=lambda text: None)
    if location.run is None:
        raise ValueError(f"{run} is not in a run's folder, from which its card is made: name a run")
    with ExitStack() as stack:
        if dry_run is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maskdm-push-")))
        else:
            folder = stack.enter_context(whole_folder(dry_run.absolute()))
        strong, weak = load(run, location.sampling)
        stage_model(strong, folder)
        how = _draw(strong, weak, num, seed, folder / SAMPLES)
        _write_card(run, strong, repository, folder, how, license, written)
        files = [path for path in folder.rglob("*") if path.is_file()]
        size = size_text(sum(path.stat().st_size for path in files))
        place = str(dry_run) if dry_run is not None else upload(folder, repository, private)
    nothing = "" if dry_run is None else "; nothing was uploaded"
    print(f"{counted(len(files), 'file')}, {size} -> {place}{nothing}")
    return DONE


def _draw(strong: Loaded, weak: Loaded | None, num: int, seed: int, path: Path) -> str:
    """Saves a sheet of samples, and says how they were drawn."""
    from maskdm.images.output import save_images
    from maskdm.sampling.generate import generate

    say_how_long(strong, strong.sampling, num, weak)
    weaker = weak.trained if weak else None
    numbers = list(range(num))
    save_images(generate(strong.trained, strong.sampling, numbers, seed, weak=weaker), path)
    return f"{counted(num, 'sample')}, seed {seed}, {sampling_text(strong.sampling)}"


def _write_card(
    run: str,
    strong: Loaded,
    repository: str,
    folder: Path,
    how: str,
    license: str | None,
    notes: str,
) -> None:
    """Writes the card, and says what it lacks."""
    from maskdm.commands.card_text import Uploaded, card_text
    from maskdm.evaluation.records import read_records, records_file
    from maskdm.evaluation.samples import weights_sha256
    from maskdm.export.hub import CARD, public_recipe, public_record

    path, weights = records_file(run), weights_sha256(strong.trained.model)
    every = read_records(path) if path is not None else []
    records = [one for one in every if one["samples"].get("weights_sha256") == weights]
    if len(records) < len(every):
        say_note(f"{counted(len(every) - len(records), 'evaluation')} of other weights left out")
    if not records:
        say_note(f"the card has no metrics: run maskdm evaluate {run} first")
    if license is None:
        say_note("the card says that the model has no licence: --license NAME gives it one")
    recipe = public_recipe(strong.location.recipe)
    public = [public_record(one, repository) for one in records]
    about = Uploaded(repository, folder, recipe, how, public, license, notes)
    write_text(folder / CARD, card_text(strong, about))


def _read(notes: Path | None) -> str:
    """The author's Markdown. Raises ValueError where it cannot be read."""
    try:
        return notes.read_text("utf-8") if notes is not None else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--notes {notes} cannot be read: {one_line(error)}") from None
