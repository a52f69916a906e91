"""Pre-trained networks as features: torch-fidelity's, or any file of the user's own."""

from __future__ import annotations

import hashlib
import os
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]
"""uint8 (n, C, H, W) on the device -> float32 (n, D)."""

ALIASES = {
    "inception": "inception-v3-compat",  # FID's: the TensorFlow weights, in PyTorch
    "dinov2": "dinov2-vit-l-14",  # FD-DINOv2's (Stein et al. 2023)
    "clip": "clip-vit-b-32",  # Kynkäänniemi et al. 2023
}
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}_pretrain.pth"
DINOV2_CODE = "https://github.com/facebookresearch/dinov2"


def load_named(name: str, weights: Path | None, device: torch.device) -> tuple[Network, str, int]:
    """One of torch-fidelity's networks, with its weights from a file or from the net.

    Downloads go to PyTorch's hub folder, and their SHA-256 is checked where it is known.

    Args:
        name: `inception`, `dinov2`, `clip`, or torch-fidelity's name of a CLIP or DINOv2.
        weights: a local file of the weights; None = the hub folder's, downloaded if need be.

    Returns:
        The network; the SHA-256 of its weights; how many logits follow the features in its
        answer (1,008 for inception, whose score needs them, else 0).

    Raises:
        ValueError: no weights (with what to get, and from where), or other ones.
    """
    full = ALIASES.get(name, name)
    build = {"inception": _inception, "dinov2": _dinov2, "clip": _clip}[full.split("-")[0]]
    url = _url(full)
    path = weights if weights is not None else _hub_folder() / _file_name(full, url)
    if weights is not None and not path.is_file():
        raise ValueError(f"--weights {path}: there is no such file")
    if not path.is_file():
        _download(name, url, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated loaders and missing accelerators
            module, num_logits = build(full, path)
    except ValueError:
        raise
    except Exception as error:  # whatever unpickling and shapes of others' networks raise
        text = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"features {name}: {path} doesn't hold its weights ({text}): get {url}"
        ) from None
    module.to(device).eval()
    return lambda images: torch.cat(module(images), dim=1), _sha256(path), num_logits


def load_file(path: Path, device: torch.device) -> tuple[Network, str]:
    """A network of the user's own: TorchScript, or `.pt2` as torch.export saves it.

    It maps uint8 (n, C, H, W) to (n, D), in evaluation mode. Returns it, and the file's SHA-256.

    Raises ValueError where the file holds none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript's own deprecation
            if path.suffix == ".pt2":
                module: Any = torch.export.load(path).module().to(device)
            else:
                module = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # torch raises many kinds for what is no such file
        text = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"features {path}: no TorchScript network, nor one saved by torch.export as .pt2 "
            f"({text})"
        ) from None

    def network(images: Tensor) -> Tensor:
        try:
            answer = module(images)
        except Exception as error:  # the network's own complaint, of any kind
            text = textwrap.shorten(str(error).strip().splitlines()[-1], 200, placeholder=" ...")
            shape = "x".join(map(str, images.shape[1:]))
            raise ValueError(f"features {path}: it doesn't take uint8 {shape} ({text})") from None
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(images):
            seen = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"features {path}: it gives {seen}, and (n, D) is needed")
        return answer

    return network, _sha256(path)


def _inception(name: str, path: Path) -> tuple[nn.Module, int]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Its own loader would run what a pickle asks for: first see that there are only tensors.
    torch.load(path, map_location="cpu", weights_only=True)
    network = FeatureExtractorInceptionV3(name, ["2048", "logits_unbiased"], str(path))
    return network, network.fc.out_features


def _clip(name: str, path: Path) -> tuple[nn.Module, int]:
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    return FeatureExtractorCLIP(name, ["clip"], str(path)), 0


def _dinov2(name: str, path: Path) -> tuple[nn.Module, int]:
    """torch-fidelity's, which takes no local file itself: its network is filled from one here."""
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class FromFile(FeatureExtractorDinoV2):
        def __init__(self, network: nn.Module):
            nn.Module.__init__(self)
            self.name, self.features_list = name, ["dinov2"]
            self.feature_extractor_internal_dtype = torch.float32
            self.model = network.requires_grad_(False)

    os.environ["XFORMERS_DISABLED"] = "1"  # as torch-fidelity does: else its attention differs
    try:
        # The code runs as it comes from its authors' repository, as torch-fidelity's does.
        network: Any = torch.hub.load(
            "facebookresearch/dinov2", _dinov2_name(name), pretrained=False, trust_repo=True
        )
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
        raise ValueError(
            f"features dinov2 need their network's code, which could not be fetched ({error}): "
            f"get {DINOV2_CODE}/archive/refs/heads/main.zip and unpack it as {folder}"
        ) from None
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return FromFile(network), 0


def _dinov2_name(name: str) -> str:
    """torch-fidelity's dinov2-vit-l-14 is the authors' dinov2_vitl14."""
    return "dinov2_" + name.removeprefix("dinov2-").replace("-", "")


def _url(name: str) -> str:
    if name.startswith("dinov2"):
        return DINOV2.format(_dinov2_name(name))
    if name.startswith("clip"):
        from torch_fidelity.feature_extractor_clip import MODEL_URLS

        url: str = MODEL_URLS[name]
        return url
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    url = URL_INCEPTION_V3
    return url


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _file_name(name: str, url: str) -> str:
    """As torch-fidelity and PyTorch name the file, so that what is there already is found."""
    parts = urlparse(url).path.split("/")
    return f"{name}-{parts[-2]}.pt" if name.startswith("clip") else parts[-1]


def _download(name: str, url: str, path: Path) -> None:
    """Fetches weights; a broken download leaves nothing. Raises ValueError with the way out."""
    parts = urlparse(url).path.split("/")
    known = parts[-2] if name.startswith("clip") else None
    if "inception" in url:
        known = Path(url).stem.rsplit("-", 1)[1]  # the hash's first digits, in the file's name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=known, progress=False)
    except (OSError, RuntimeError) as error:  # no network; a wrong hash
        reason = textwrap.shorten(str(error), 90, placeholder=" ...")
        raise ValueError(
            f"features {name} need weights that are not here and could not be fetched ({reason}): "
            f"get {url} and name the file with --weights FILE, or put it at {path}"
        ) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
