"""Networks as features: torch-fidelity's with weights made here, and files of the user's."""

from __future__ import annotations

import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch_fidelity import feature_extractor_clip, feature_extractor_inceptionv3

from maskdm.evaluation import features as module
from maskdm.evaluation.distances import kid
from maskdm.evaluation.features import available_features, features_of, make_features
from maskdm.images.store import open_store
from maskdm.recipe import Data, Evaluation
from maskdm.settings import SettingsError

CPU = torch.device("cpu")


def images(num: int, shape=(16, 16, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def vectors(pixels: np.ndarray, **settings: object) -> np.ndarray:
    features = make_features(Evaluation(**settings), None, CPU)
    return features.vectors(features_of(pixels, features, None))


class Means(nn.Module):
    """Mean of each channel, and the mean square of the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return torch.cat([x.mean((2, 3)), x[:, :1].square().mean((2, 3))], dim=1)


def script(module: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(module), path)
    return str(path)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*args, **kwargs):
        raise URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def expected_means(pixels: np.ndarray) -> np.ndarray:
    x = pixels.astype(np.float64)
    return np.concatenate([x.mean((1, 2)), np.square(x[..., :1]).mean((1, 2))], axis=1)


def test_a_torchscript_file_gives_features(tmp_path):
    pixels = images(150, (8, 12, 3))  # more than a batch
    found = vectors(pixels, features=script(Means(), tmp_path / "means.pt"))
    np.testing.assert_allclose(found, expected_means(pixels), rtol=1e-5)
    assert found.dtype == np.float32


def test_an_exported_file_gives_features(tmp_path):
    batch = torch.export.Dim("batch", min=1, max=1024)
    example = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    program = torch.export.export(Means(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "means.pt2")
    pixels = images(70, (8, 8, 3))
    found = vectors(pixels, features=str(tmp_path / "means.pt2"))
    np.testing.assert_allclose(found, expected_means(pixels), rtol=1e-5)


def test_the_users_network_gets_all_channels(tmp_path):
    file = script(Means(), tmp_path / "means.pt")
    assert vectors(images(4, (8, 8, 1)), features=file).shape == (4, 2)
    assert vectors(images(4, (8, 8, 4)), features=file).shape == (4, 5)


class InCompany(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().mean((2, 3))
        return x - x.mean(0)


class Flat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class OnlyFour(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().reshape(x.shape[0], 3 * 4 * 4)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (InCompany(), "an image's features depend on the others in its batch"),
        (Flat(), r"expected an answer of shape \(n, D\), got \(1, 3, 8, 8\)"),
        (OnlyFour(), "the network does not accept uint8 3x8x8"),
    ],
)
def test_networks_without_usable_features_are_refused(tmp_path, module, message):
    file = script(module, tmp_path / "network.pt")
    with pytest.raises(ValueError, match=message):
        vectors(images(2, (8, 8, 3)), features=file)


def test_files_without_a_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.pt: no such file"):
        vectors(images(2), features=str(tmp_path / "nothing.pt"))
    for name in ("text.pt", "text.pt2"):
        (tmp_path / name).write_text("no network")
        with pytest.raises(
            ValueError, match="not a TorchScript network, nor one saved by torch.export"
        ):
            vectors(images(2), features=str(tmp_path / name))


def test_principal_components_of_large_images_are_taken_a_few_at_a_time(monkeypatch, tmp_path):
    pixels = images(40)
    np.save(tmp_path / "images.npy", pixels)
    store = open_store(Data(source=str(tmp_path / "images.npy"), size=16), progress=False)
    features = make_features(Evaluation(num_components=5), store, CPU)
    whole = features.extract(pixels)
    monkeypatch.setattr(module, "MAX_FIT_BYTES", 7 * 4 * 16 * 16 * 3)
    np.testing.assert_allclose(features.extract(pixels), whole, rtol=1e-4, atol=0.01)


def test_auto_features_fall_back_on_pca_with_a_note(monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    store = open_store(Data(source="digits", channels=1), progress=False)
    settings = Evaluation(features="auto", num_components=4)
    found, note = available_features(settings, store, CPU)
    assert found.name == "pca" and note is not None and "no FID" in note and "no network" in note
    assert available_features(Evaluation(num_components=4), store, CPU)[1] is None


def test_unknown_features_list_the_known_ones():
    with pytest.raises(SettingsError, match="unknown features 'inceptoin': did you mean inception"):
        Evaluation(features="inceptoin")
    with pytest.raises(
        SettingsError, match="known: auto, pca, inception, dinov2, clip, dinov2-vit-s-14"
    ):
        Evaluation(features="xyz")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception's architecture with random weights, scaled so that signals do not vanish."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], "nowhere"
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


class Pictures(torch.utils.data.Dataset):
    def __init__(self, pixels: np.ndarray):
        self.pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


@pytest.mark.slow
def test_inception_measures_what_torch_fidelity_measures(inception_file):
    """Resizing, order of channels, layer: our KID of two sets is theirs, from end to end.

    (Their FID would take 15 seconds for the eigenvalues of a 2,048 x 2,048 matrix.)
    """
    one, two = images(4, seed=1), images(3, seed=2) // 2
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(one),
        input2=Pictures(two),
        kid=True,
        kid_subset_size=3,
        isc=True,
        isc_splits=1,
        feature_extractor_weights_path=str(inception_file),
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        cache=False,
    )
    settings = Evaluation(features="inception", weights=str(inception_file))
    features = make_features(settings, None, CPU)
    answers = features_of(one, features, None)
    ours = kid(features.vectors(answers), features.vectors(features.extract(two)), 3)
    assert features.vectors(answers).shape == (4, 2048)
    assert features.logits(answers).shape == (4, 1008)
    assert ours.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    logits = torch.from_numpy(features.logits(answers))
    score = torch_fidelity.metric_isc.isc_features_to_metric(logits, splits=1)
    expected = theirs["inception_score_mean"]
    assert score["inception_score_mean"] == pytest.approx(expected, rel=1e-5)
    grey = images(2, (16, 16, 1))
    colours = features.extract(grey.repeat(3, axis=3))
    np.testing.assert_array_equal(features.extract(grey), colours)
    with pytest.raises(ValueError, match="require RGB or grey images, not 4 channels"):
        features.extract(images(2, (16, 16, 4)))


def test_clip_weights_come_from_a_file(tmp_path):
    torch.manual_seed(0)
    clip = feature_extractor_clip.CLIPVisual(8, 32, 1, 64, 16)
    clip.text_projection = nn.Parameter(torch.zeros(4, 8))
    clip.forward = clip.visual.forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(clip, torch.zeros(2, 3, 32, 32))
        torch.jit.save(traced, tmp_path / "clip.pt")
    pixels = images(3, (32, 32, 3))
    found = vectors(pixels, features="clip", weights=str(tmp_path / "clip.pt"))
    mean = 255 * torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = 255 * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    inputs = (torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()) - mean) / std
    with torch.no_grad():
        expected = clip.half().float().visual(inputs)  # its weights are kept in half precision
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


HUB = """
dependencies = ["torch"]
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 5)

    def forward(self, x):
        return self.layer(x.mean((2, 3)))

def dinov2_vitl14(pretrained=True, **kwargs):
    assert not pretrained
    return Tiny()
"""


def test_dinov2_weights_come_from_a_file(tmp_path):
    """With the authors' code in PyTorch's hub folder, as on a machine without Internet."""
    code = tmp_path / "torch" / "hub" / "facebookresearch_dinov2_main"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUB)
    state = {"layer.weight": torch.randn(5, 3), "layer.bias": torch.randn(5)}
    torch.save(state, tmp_path / "dinov2.pth")
    pixels = np.broadcast_to(images(6, (1, 1, 3)), (6, 14, 14, 3)).copy()  # one colour each
    found = vectors(pixels, features="dinov2", weights=str(tmp_path / "dinov2.pth"))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    colours = (pixels[:, 0, 0] / 255 - mean) / std
    expected = colours @ state["layer.weight"].T.numpy() + state["layer.bias"].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        (
            "inception",
            "https://github.com/toshas/torch-fidelity/.*6726825d.pth and put it at .*or name the",
        ),
        (
            "dinov2",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        ),
        ("dinov2-vit-s-14", "dinov2_vits14/dinov2_vits14_pretrain.pth"),
        ("clip", "https://openaipublic.azureedge.net/clip/models/.*/ViT-B-32.pt"),
    ],
)
def test_missing_weights_say_what_to_get_and_where_to_put_it(name, url):
    with pytest.raises(ValueError, match=url) as error:
        make_features(Evaluation(features=name), None, CPU)
    assert "--weights FILE" in str(error.value) and "\n" not in str(error.value)


def test_wrong_weights_are_refused(tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not contain its weights"):
        make_features(
            Evaluation(features="inception", weights=str(tmp_path / "other.pth")), None, CPU
        )
    with pytest.raises(ValueError, match="--weights nowhere: no such file"):
        make_features(Evaluation(features="clip", weights="nowhere"), None, CPU)
    with pytest.raises(ValueError, match="features pca are fitted to the reference's images"):
        make_features(Evaluation(features="pca", weights="x.pth"), None, CPU)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_weights_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match="does not contain its weights"):
        make_features(Evaluation(features="inception", weights="evil.pth"), None, CPU)
    assert not Path("harm").exists()


def test_principal_components_are_sklearns_and_are_kept():
    from sklearn.decomposition import PCA

    store = open_store(Data(source="digits", size=8, channels=1), progress=False)
    settings = Evaluation(num_components=5, pixel_max=16)
    first = make_features(settings, store, CPU)
    pixels = store.images[:].reshape(len(store), -1) * (16 / 255)
    expected = PCA(5, random_state=0).fit_transform(pixels)
    np.testing.assert_allclose(first.extract(store.images), expected, rtol=1e-3, atol=1e-3)
    again = make_features(settings, store, CPU)
    assert again.sha256 == first.sha256
    np.testing.assert_array_equal(again.extract(store.images), first.extract(store.images))
    assert make_features(Evaluation(num_components=4), store, CPU).sha256 != first.sha256


def test_there_are_as_many_components_as_images_and_values_allow(tmp_path):
    store = open_store(Data(source="digits", size=8, channels=1), progress=False)
    features = make_features(Evaluation(num_components=65), store, CPU)
    assert features.dim_of((8, 8, 1)) == 64
    assert "64 components instead of 65" in features.note
    assert features.sha256 == make_features(Evaluation(num_components=64), store, CPU).sha256
    np.save(tmp_path / "few.npy", store.images[:20])
    few = open_store(Data(source=str(tmp_path / "few.npy"), size=8, channels=1), progress=False)
    features = make_features(Evaluation(), few, CPU)
    assert features.dim_of((8, 8, 1)) == 19  # 20 images span 19 directions around their mean
    assert "19 components instead of 32" in features.note


def test_components_need_images():
    with pytest.raises(ValueError, match="pca are fitted to the reference's images"):
        make_features(Evaluation(), None, CPU)


@pytest.mark.network
@pytest.mark.parametrize(("name", "dim"), [("inception", 2048), ("dinov2-vit-s-14", 384)])
def test_weights_are_downloaded(name, dim, monkeypatch):
    monkeypatch.undo()
    assert vectors(images(3, (32, 32, 3)), features=name).shape == (3, dim)
