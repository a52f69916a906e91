"""Pre-trained networks as features: torch-fidelity's, or a file of the user's."""

from __future__ import annotations

import hashlib
import mmap
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskdm.words import one_line

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
    """One of torch-fidelity's networks, with weights from a file or from the Internet.

    Downloads go to PyTorch's hub folder, and their SHA-256 is checked where it is known.

    Args:
        name: `inception`, `dinov2`, `clip`, or torch-fidelity's name of a CLIP or DINOv2.
        weights: a local file of the weights; None = that in the hub folder, downloaded if need be.

    Gives the network; the SHA-256 of its weights; the number of logits that follow the features in
    its answer (1,008 for inception, whose score needs them, otherwise 0).

    Raises ValueError for wrong weights, and missing ones; it says what to get, and from where.
    """
    full = ALIASES.get(name, name)
    url, file_name, known = _origin(full)
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if weights is not None and not path.is_file():
        raise ValueError(f"--weights {path}: no such file")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=known, progress=False)
        except (OSError, RuntimeError) as error:  # no network; a wrong hash
            raise ValueError(
                f"features {name} need weights that could not be downloaded ({one_line(error, 90)})"
                f": get {url} and put it at {path}, or name the file with --weights FILE (in a "
                "recipe evaluation.weights)"
            ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated loaders and missing accelerators
            module = _dinov2(full, path) if full.startswith("dinov2") else _registered(full, path)
    except ValueError:
        raise
    except Exception as error:  # unpickling and wrong shapes raise many kinds
        why = f"{path} does not contain its weights ({one_line(error, 200)})"
        raise ValueError(f"features {name}: {why}: get {url}") from None
    module.to(device).eval()
    num_logits = module.fc.out_features if name == "inception" else 0
    return lambda images: torch.cat(module(images), dim=1), _sha256(path), num_logits


def load_file(path: Path, device: torch.device) -> tuple[Network, str]:
    """A network of the user's: TorchScript, or `.pt2` as torch.export saves it.

    It maps uint8 (n, C, H, W) to (n, D), in evaluation mode. Returns it, and the file's SHA-256.

    Raises ValueError where the file does not contain one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript's own deprecation
            if path.suffix == ".pt2":
                module: Any = torch.export.load(path).module().to(device)
            else:
                module = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # torch raises many kinds for other files
        raise ValueError(
            f"features {path}: not a TorchScript network, nor one saved by torch.export as .pt2 "
            f"({one_line(error, 200)})"
        ) from None

    def network(images: Tensor) -> Tensor:
        try:
            answer = module(images)
        except Exception as error:  # the network's own, of any kind
            last = one_line((str(error).strip() or type(error).__name__).splitlines()[-1], 200)
            shape = "x".join(map(str, images.shape[1:]))
            raise ValueError(
                f"features {path}: the network does not accept uint8 {shape} ({last})"
            ) from None
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(images):
            seen = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise ValueError(f"features {path}: expected an answer of shape (n, D), got {seen}")
        return answer

    return network, _sha256(path)


def _registered(name: str, path: Path) -> Any:
    """torch-fidelity's inception or clip."""
    from torch_fidelity.utils import create_feature_extractor

    outputs = ["clip"]
    if name.startswith("inception"):
        outputs = ["2048", "logits_unbiased"]
        # Its own loader would run code from a pickle: check first that there are only tensors.
        torch.load(path, map_location="cpu", weights_only=True)
    return create_feature_extractor(
        name, outputs, cuda=False, feature_extractor_weights_path=str(path), verbose=False
    )


def _dinov2(name: str, path: Path) -> Any:
    """torch-fidelity's, which cannot load a local file: its network is filled from one here."""
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA, FeatureExtractorDinoV2

    class FromFile(FeatureExtractorDinoV2):
        def __init__(self, network: nn.Module):
            nn.Module.__init__(self)
            self.name, self.features_list = name, ["dinov2"]
            self.feature_extractor_internal_dtype = torch.float32
            self.model = network.requires_grad_(False)

    os.environ["XFORMERS_DISABLED"] = "1"  # as torch-fidelity does: its attention differs
    try:
        # This runs code from the authors' repository, as torch-fidelity does.
        network: Any = torch.hub.load(
            "facebookresearch/dinov2", MODEL_METADATA[name], pretrained=False, trust_repo=True
        )
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
        raise ValueError(
            f"features dinov2 need the network's code, which could not be downloaded ({error}): "
            f"get {DINOV2_CODE}/archive/refs/heads/main.zip and unpack it as {folder}"
        ) from None
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return FromFile(network)


def _origin(name: str) -> tuple[str, str, str | None]:
    """URL of a network's weights, their name in PyTorch's hub folder, first digits of SHA-256."""
    if name.startswith("dinov2"):
        from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA

        url = DINOV2.format(MODEL_METADATA[name])
        return url, Path(url).name, None
    if name.startswith("clip"):
        from torch_fidelity.feature_extractor_clip import MODEL_URLS

        known = Path(MODEL_URLS[name]).parent.name
        return MODEL_URLS[name], f"{name}-{known}.pt", known
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3, Path(URL_INCEPTION_V3).name, Path(URL_INCEPTION_V3).stem.split("-")[-1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()
