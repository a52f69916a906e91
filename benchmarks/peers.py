"""Side by side with other trainers of diffusion models, for the same seconds on the same machine.

    python benchmarks/peers.py [--data faces FOLDER ...] [--minutes 2.5 10] [--only NAME ...]
                               [--lr RATE] [--features FILE] [--table]

Each trial trains one network for so many minutes on images in memory, draws 1,000 samples by DDIM
in 50 steps, and appends a line to `benchmarks/results/peers.jsonl`: their Fréchet distance from all
images, in 32 principal components of pixels from 0 to 1 (or in the features of a TorchScript file),
images seen, steps. Trials whose line is there are skipped. Nothing else may run on the machine.

Rows: `maskdm` is this package's recipe for such images, with all that a run costs from its start
to its exported model; the others get as many seconds as it took. `lucidrains` is the U-Net and the
settings of denoising-diffusion-pytorch's Trainer, `diffusers` UNet2DModel and the settings of
diffusers' training script, both with a width that fits the size and a learning rate that falls
along a cosine; their seconds do not count loading, previews and measuring. "Tuned" is the best of
some learning rates, which seed 0 chose, with fresh seeds. The first rate is the peer's own, and all
else there is as it comes; under other rates lucidrains averages after every step: so few steps are
too few for an average after every tenth. `--lr` gives peers this one rate, and all trainers one
seed. Needs `pip install denoising-diffusion-pytorch`.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from maskdm.evaluation.distances import frechet_distance
from maskdm.images.store import open_store
from maskdm.recipe import Data
from maskdm.recipe_files import load_recipe
from maskdm.runs.load import load_model
from maskdm.sampling.generate import generate
from maskdm.settings import changed
from maskdm.training.trainer import train

RESULTS = Path(__file__).parent / "results" / "peers.jsonl"
NUM_SAMPLES, NUM_STEPS, SAMPLED_AT_ONCE = 1000, 50, 50
BATCH_SIZE = 32  # of the peers
RATES = [1e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
TUNED_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        data: a source.
        minutes: of training.
        trainer: a row of TRAINERS.
        lr: of a peer; None = the recipe's.
        seed: of everything random.
    """

    data: str
    minutes: float
    trainer: str
    lr: float | None
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells a trial from all others; of a folder or archive its last name."""
        return {**vars(self), "data": Path(self.data).name}


@dataclass(frozen=True)
class Drawn:
    """What a training gives: samples uint8 (N, H, W, C), and its costs."""

    samples: np.ndarray
    images: int
    steps: int
    num_params: int
    train_sec: float


def run_maskdm(trial: Trial, images: np.ndarray, work: Path) -> Drawn:
    """The recipe for such images, from the command's start to its end."""
    side = images.shape[1]
    recipe = load_recipe("faces" if trial.data.startswith("faces") else "photos32")
    data = changed(recipe.data, source=trial.data, size=side)
    recipe = changed(recipe, data=data, seed=trial.seed)
    folder = work / f"{Path(trial.data).name}-{trial.minutes:g}-{trial.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted trial begins again
    start = time.perf_counter()
    done = train(recipe, folder, show=False, minutes=trial.minutes)
    seconds = time.perf_counter() - start
    loaded = load_model(folder)
    settings = changed(loaded.sampling, sampler="ddim", steps=NUM_STEPS, eta=0.0)
    samples = generate(loaded.trained, settings, list(range(NUM_SAMPLES)))
    last = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    params = sum(p.numel() for p in loaded.trained.model.parameters())
    assert done.finished
    return Drawn(samples, last["images"], last["step"], params, seconds)


class Lucidrains:
    """denoising-diffusion-pytorch: its Unet, GaussianDiffusion, and its Trainer's settings."""

    def __init__(self, side: int, lr: float):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        net = Unet(dim=16, dim_mults=(1, 2, 4))
        self.model = GaussianDiffusion(net, image_size=side, sampling_timesteps=NUM_STEPS)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr, betas=(0.9, 0.99))
        every = 10 if lr == RATES[0] else 1
        self.ema = EMA(self.model, beta=0.995, update_every=every)

    def step(self, x: Tensor) -> None:
        """A step on images from 0 to 1, (B, C, H, W)."""
        self.model(x).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def sample(self, num: int) -> Tensor:
        """Images from 0 to 1, (N, C, H, W)."""
        self.ema.ema_model.eval()
        return self.ema.ema_model.sample(batch_size=num)


class Diffusers:
    """diffusers' UNet2DModel, by the settings of its script for unconditional images."""

    def __init__(self, side: int, lr: float):
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        self.side = side
        self.model = UNet2DModel(
            sample_size=side,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=16,
        )
        self.noise = DDPMScheduler(num_train_timesteps=1000)
        self.solver = DDIMScheduler.from_config(self.noise.config)
        settings = {"betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, **settings)
        averaging = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
        self.ema = EMAModel(self.model.parameters(), decay=0.9999, **averaging)

    def step(self, x: Tensor) -> None:
        """A step on images from 0 to 1, (B, C, H, W)."""
        x0, noise = 2 * x - 1, torch.randn_like(x)
        t = torch.randint(1000, (len(x),))
        answer = self.model(self.noise.add_noise(x0, noise, t), t).sample
        nn.functional.mse_loss(answer, noise).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())

    @torch.no_grad()
    def sample(self, num: int) -> Tensor:
        """Images from 0 to 1, (N, C, H, W)."""
        averaged = copy.deepcopy(self.model).eval()
        self.ema.copy_to(averaged.parameters())
        x = torch.randn(num, 3, self.side, self.side)
        self.solver.set_timesteps(NUM_STEPS)
        for t in self.solver.timesteps:
            x = self.solver.step(averaged(x, t).sample, t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)


def run_peer(
    make: Callable[[int, float], Any], trial: Trial, images: np.ndarray, total: float
) -> Drawn:
    """Trains a peer for `total` seconds; its rate falls along a cosine, warmed up in 5 %."""
    torch.manual_seed(trial.seed)
    peer = make(images.shape[1], trial.lr)
    pixels = torch.from_numpy(np.ascontiguousarray(images)).movedim(3, 1)
    order, step = torch.Generator().manual_seed(trial.seed), 0
    start = time.perf_counter()
    while (done := (time.perf_counter() - start) / total) < 1:
        for group in peer.optimizer.param_groups:
            group["lr"] = trial.lr * min(done / 0.05, 0.5 + 0.5 * np.cos(np.pi * done))
        x = pixels[torch.randint(len(pixels), (BATCH_SIZE,), generator=order)].float() / 255
        if torch.rand((), generator=order) < 0.5 and not trial.data.startswith("faces"):
            x = x.flip(3)
        peer.step(x)
        step += 1
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        parts = [peer.sample(SAMPLED_AT_ONCE) for _ in range(NUM_SAMPLES // SAMPLED_AT_ONCE)]
    samples = (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8)
    params = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
    array = samples.movedim(1, 3).numpy()
    return Drawn(array, step * BATCH_SIZE, step, params, seconds)


PEERS = {"lucidrains": Lucidrains, "diffusers": Diffusers}


def features_of(images: np.ndarray, file: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    """Features of uint8 (N, H, W, C), fitted to all images or read from a TorchScript file."""
    if file is not None:
        network = torch.jit.load(file).eval()

        def from_network(x: np.ndarray) -> np.ndarray:
            parts = torch.from_numpy(np.ascontiguousarray(x)).movedim(3, 1).split(500)
            with torch.inference_mode():
                return torch.cat([network(part) for part in parts]).double().numpy()

        return from_network
    components = PCA(32, random_state=0).fit(images.reshape(len(images), -1) / 255)
    return lambda x: components.transform(x.reshape(len(x), -1) / 255)


def trials_of(
    data: str, minutes: float, lr: float | None, lines: list[dict[str, Any]]
) -> list[Trial]:
    """The trials that are wanted, as far as results say: ours with three seeds, and the peers'.

    With a rate for the peers, one trial of each trainer.
    """
    if lr is not None:
        pairs = [("maskdm", None), *((peer, lr) for peer in PEERS)]
        return [Trial(data, minutes, name, rate, TUNED_SEEDS[0]) for name, rate in pairs]
    ours = [Trial(data, minutes, "maskdm", None, seed) for seed in TUNED_SEEDS]
    return ours + [one for peer in PEERS for one in tuned(data, minutes, peer, lines)]


def tuned(data: str, minutes: float, peer: str, lines: list[dict[str, Any]]) -> list[Trial]:
    """A peer's trials: rising rates with seed 0 until one is worse, the best with fresh seeds."""
    trials, found = list[Trial](), dict[float, float]()
    for lr in RATES:
        trials.append(Trial(data, minutes, peer, lr, 0))
        if (line := line_of(trials[-1], lines)) is None:
            return trials
        found[lr] = line["frechet"]
        if found[lr] > min(found.values()):
            break
    best = min(found, key=found.__getitem__)
    return trials + [Trial(data, minutes, peer, best, seed) for seed in TUNED_SEEDS]


def line_of(trial: Trial, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of a trial, if it was run."""
    same = [line for line in lines if all(line[key] == one for key, one in trial.key.items())]
    return same[0] if same else None


def seconds_of(trial: Trial, lines: list[dict[str, Any]]) -> float:
    """What `maskdm` took on the same images: it keeps the minutes only roughly."""
    took = [
        line["train_sec"]
        for line in lines
        if (line["data"], line["minutes"]) == (trial.key["data"], trial.minutes)
        and line["trainer"] == "maskdm"
    ]
    return statistics.mean(took) if took else 60 * trial.minutes


def run_trial(
    trial: Trial, features: Path | None, work: Path, lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """Trains, draws and measures, given the results so far; a line of results."""
    size = 16 if trial.data.startswith("faces") else 32
    store = open_store(Data(source=trial.data, size=size), progress=False)
    images = np.asarray(store.images)
    if trial.trainer == "maskdm":
        drawn = run_maskdm(trial, images, work)
    else:
        drawn = run_peer(PEERS[trial.trainer], trial, images, seconds_of(trial, lines))
    of = features_of(images, features)
    return {
        **common.facts("peers"),
        "command": "python benchmarks/peers.py",  # of any folders
        **trial.key,
        "frechet": frechet_distance(of(drawn.samples), of(images)),
        "features": "pca" if features is None else features.name,
        "images": drawn.images,
        "steps": drawn.steps,
        "num_params": drawn.num_params,
        "train_sec": round(drawn.train_sec, 1),
    }


def table_of(lines: list[dict[str, Any]]) -> str:
    """A table of Markdown: each trainer's distance by data and minutes."""
    rows = [
        "| images | minutes | trainer | Fréchet distance | images seen | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for data, minutes in sorted({(line["data"], line["minutes"]) for line in lines}):
        own = [line for line in lines if (line["data"], line["minutes"]) == (data, minutes)]
        for trainer in ("maskdm", *PEERS):
            fresh = [one for one in own if one["trainer"] == trainer and one["seed"]]
            default = [one for one in own if (one["trainer"], one["lr"], one["seed"])
                       == (trainer, 1e-4, 0)]  # fmt: skip
            for name, group in (("", fresh), (", default rate", default)):
                if not group:
                    continue
                lr = group[0]["lr"]
                title = trainer + (name or ("" if lr is None else f", rate {lr:g}"))
                values = ", ".join(f"{one['frechet']:.3g}" for one in group)
                seen = statistics.mean(one["images"] for one in group)
                mean = statistics.mean(one["frechet"] for one in group)
                seconds = statistics.mean(one["train_sec"] for one in group)
                rows.append(
                    f"| {data} | {minutes:g} | {title} | {mean:.3g} ({values}) | {seen:,.0f} | "
                    f"{seconds:.0f} |"
                )
    return "\n".join(rows)


def main() -> int:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["faces:10000"], help="faces..., or images")
    parser.add_argument("--minutes", nargs="+", type=float, default=[2.5])
    parser.add_argument("--only", nargs="+", choices=["maskdm", *PEERS], help="trainers")
    parser.add_argument("--lr", type=float, help="of peers, not tuned")
    parser.add_argument("--features", type=Path, help="TorchScript of features; not for faces")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of JSON lines")
    parser.add_argument("--work", type=Path, default=Path("runs") / "peers", help="for the runs")
    parser.add_argument("--table", action="store_true", help="print the results and end")
    args = parser.parse_args()
    if args.table:
        print(table_of(common.results(args.results)))
        return 0
    for data in args.data:
        for minutes in args.minutes:
            features = None if data.startswith("faces") else args.features
            while missing := [
                trial
                for trial in trials_of(data, minutes, args.lr, common.results(args.results))
                if line_of(trial, common.results(args.results)) is None
                and (args.only is None or trial.trainer in args.only)
            ]:
                done = common.results(args.results)
                line = run_trial(missing[0], features, args.work, done)
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                common.say(f"{missing[0]}: {line['frechet']:.4g}, {line['images']:,} images")
    print(table_of(common.results(args.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
