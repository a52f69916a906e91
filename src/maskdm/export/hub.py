"""A run's model on the Hugging Face Hub: what is uploaded, and the upload."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from maskdm.evaluation.records import Record
from maskdm.export.pipeline import make_pipeline, save_pipeline
from maskdm.files import expanded, write_text
from maskdm.images.huggingface import PREFIX
from maskdm.recipe import Recipe, Sampling
from maskdm.runs.load import Loaded
from maskdm.settings import changed
from maskdm.words import one_line

CARD, RECIPE, SAMPLES, LOSS = "README.md", "recipe.yaml", "samples.png", "loss.png"
LOG_IN = "log in first, with `hf auth login` or a token in HF_TOKEN"


def stage_model(loaded: Loaded, folder: Path) -> None:
    """Writes a run's model into an empty folder as it is to lie on the Hub, without card and sheet.

    That is the model, exported anew, without guidance by a model that stays here; the recipe
    without the names of local folders; and the plot of the loss. Training images, environment.json
    with its paths and commands, and whatever else lies in the model's folder stay here.

    Raises:
        ValueError: the model is outside of a run's folder.
        OSError: the disk refuses.
    """
    location = loaded.location
    recipe = public_recipe(location.recipe)
    save_pipeline(make_pipeline(loaded.trained, public_sampling(loaded.sampling)), folder)
    write_text(folder / RECIPE, recipe.to_yaml())
    assert location.run is not None  # else it has no recipe
    if (location.run / LOSS).is_file():
        shutil.copy(location.run / LOSS, folder / LOSS)


def public_sampling(sampling: Sampling) -> Sampling:
    """Settings without guidance by another model, which does not come along."""
    return changed(sampling, guidance={}) if sampling.guidance.kind == "autoguidance" else sampling


def public_recipe(recipe: Recipe) -> Recipe:
    """A recipe in which files and folders of this machine have their last names only."""
    features = public_name(recipe.evaluation.features)
    is_file = os.sep in recipe.evaluation.features
    evaluation = changed(
        recipe.evaluation,
        features=f"./{features}" if is_file else features,
        weights=recipe.evaluation.weights and public_name(recipe.evaluation.weights),
    )
    guidance = changed(
        recipe.sampling.guidance, weak=public_name(recipe.sampling.guidance.weak, is_model=True)
    )
    return changed(
        recipe,
        data=changed(recipe.data, source=public_name(recipe.data.source)),
        init=recipe.init and public_name(recipe.init, is_model=True),
        evaluation=evaluation,
        sampling=changed(recipe.sampling, guidance=guidance),
    )


def public_record(record: Record, repository: str) -> Record:
    """A record of an evaluation in which files and folders of this machine have no paths.

    Args:
        record: see `evaluation.records`.
        repository: the Hub id that stands for the model's place.
    """
    renamed = {
        record["reference"]["source"]: public_name(record["reference"]["source"]),
        record["features"]["name"]: public_name(record["features"]["name"]),
        record["samples"].get("model", repository): repository,
    }
    notes = list(record["notes"])
    for old, new in renamed.items():
        if os.sep in old:
            notes = [note.replace(old, new) for note in notes]
    samples = {**record["samples"], "model": repository}
    reference = {**record["reference"], "source": renamed[record["reference"]["source"]]}
    features = {**record["features"], "name": renamed[record["features"]["name"]]}
    parts = {"samples": samples, "reference": reference, "features": features, "notes": notes}
    return {**record, **parts}


def public_name(name: str, is_model: bool = False) -> str:
    """What others may read of a name: a Hub id, a known name, an address without its secrets, or
    the last part of a local path.

    Args:
        name: of images (`data.source`), a file, or a model.
        is_model: whether `owner/name` is a model's Hub id.
    """
    if "://" in name:
        address = urlsplit(name)
        return urlunsplit(address._replace(netloc=address.netloc.split("@")[-1], query=""))
    if is_model:
        return name if is_hub_model(name) else Path(name).name
    if dataset_id(name):
        return name
    prefix = PREFIX if name.startswith(PREFIX) else ""
    return prefix + (Path(name.removeprefix(prefix)).name or "images")


def is_hub_model(name: str) -> bool:
    """Whether a model's name is a Hub id, and not that of a folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not expanded(name).exists()


def dataset_id(source: str) -> str | None:
    """The Hub id of a source `hf:OWNER/NAME...`; None for other sources, and folders here."""
    match = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)(:[\w.-]+)*", source)
    return None if match is None or expanded(match[1]).exists() else match[1]


def refuse_repository(name: str) -> None:
    """Raises ValueError for a name that no repository can have, or one without an owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no Hub id: use owner/name")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no Hub id: {one_line(error, 120)}") from None


def refuse_without_login() -> None:
    """Raises ValueError where this machine has no token for the Hub."""
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise ValueError(f"the Hub accepts no upload without a login: {LOG_IN}")


def upload(folder: Path, name: str, private: bool) -> str:
    """Uploads a folder as a model, and gives its address.

    Files of the same names are replaced, and others in the folders that are uploaded are removed;
    the rest of a repository stays.

    Args:
        folder: what `stage_model` wrote, with a card.
        name: `owner/name`; it is made unless it exists.
        private: nobody else may see it.

    Raises:
        ValueError: the Hub refuses, or cannot be reached; or the repository is public, but should
            be private. Nothing is uploaded then, or the upload can be repeated.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise ValueError(
                f"{name} exists on the Hub and is public: make it private in its settings there, "
                "or use another name"
            )
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a model of maskdm",
            delete_patterns=[f"{one.name}/*" for one in folder.iterdir() if one.is_dir()],
        )
    except hub_errors() as error:
        raise ValueError(
            f"{name} was not uploaded ({one_line(error, 160)}): if you may write to it, run the "
            f"command again; else {LOG_IN}"
        ) from None
    return str(made)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises; whose errors the network's are depends on its version."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    errors: list[Any] = [HfHubHTTPError, HFValidationError, OSError]
    if "httpx" in sys.modules:
        errors.append(sys.modules["httpx"].HTTPError)
    return tuple(errors)
