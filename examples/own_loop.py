"""Masked pre-training in a training loop of your own, with samples at the end.

    python examples/own_loop.py [--out own-loop] [--scale 1.0]

The loop is plain PyTorch: a data loader, AdamW, a falling learning rate, an average of the weights.
From maskdm come the choice of visible patches, the loss, a network (any module of that face will
do), and the pipeline that draws. Only public names are used; docs/api.md lists them.

Under a minute on a CPU. It leaves OUT/samples.png, a column for each class, and OUT/model, which
`maskdm sample OUT/model` and the other commands open.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import maskdm  # isort: skip (before torch: it sets how threads wait)

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, TensorDataset

BATCH_SIZE, PATCH_SIZE, GRID = 64, 2, (4, 4)
DIFFUSION = maskdm.Diffusion(schedule="cosine", prediction="x0", weighting={"kind": "min-snr"})
# What is hidden, and for how many steps: first half of the patches, then nothing.
PHASES = {
    "pre-training": (maskdm.Mask(kind="patch", rate=0.5), 300),
    "fine-tuning": (maskdm.Mask(), 500),
}


def digits() -> TensorDataset:
    """1,797 handwritten digits, float32 (8, 8, 1) in [-1, 1], with their classes, int64."""
    data = load_digits()
    images = torch.tensor(data.images).float()[..., None] / 8 - 1
    return TensorDataset(images, torch.tensor(data.target))


def train(model: nn.Module, images: Dataset, scale: float) -> tuple[nn.Module, dict[str, list]]:
    """Trains a model in place; returns the average of its weights, and the losses by phase."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    random = torch.Generator().manual_seed(0)
    loader = DataLoader(images, BATCH_SIZE, shuffle=True, drop_last=True, generator=random)
    schedule = maskdm.make_schedule(DIFFUSION.schedule)
    losses: dict[str, list] = {}
    for phase, (mask, steps) in PHASES.items():
        steps = max(1, round(scale * steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
        losses[phase] = []
        while len(losses[phase]) < steps:
            for batch, labels in loader:
                # Hidden patches are dropped here: nothing that follows costs anything for them.
                visible = maskdm.draw_visible(mask, GRID, len(batch), random)  # (B, V)
                x0 = maskdm.gather_patches(maskdm.patchify(batch, PATCH_SIZE), visible)  # (B, V, P)

                # The loss at random times, on the visible patches.
                t = torch.randint(1000, (len(batch),), generator=random) / 999
                noise = torch.randn(x0.shape, generator=random)
                how = (visible, t, noise, schedule, DIFFUSION, labels)
                loss = maskdm.masked_denoising_loss(model, x0, *how).mean()

                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                average.update_parameters(model)
                losses[phase].append(loss.item())
                if len(losses[phase]) == steps:
                    break
        last = sum(losses[phase][-50:]) / len(losses[phase][-50:])
        tokens = f"{x0.shape[1]} of {GRID[0] * GRID[1]} patches"
        print(f"{phase}: {steps} steps, {tokens}, loss of the last steps {last:.3f}", flush=True)
    return average.module, losses


def sheet(images: list[Image.Image], columns: int = 10, side: int = 64) -> Image.Image:
    """Grey pictures in rows, enlarged without smoothing."""
    rows = -(-len(images) // columns)
    page = Image.new("L", (columns * (side + 2) + 2, rows * (side + 2) + 2), 128)
    for number, image in enumerate(images):
        place = (2 + number % columns * (side + 2), 2 + number // columns * (side + 2))
        page.paste(image.resize((side, side), Image.Resampling.NEAREST), place)
    return page


def main(argv: list[str] | None = None) -> dict[str, list]:
    """Trains, draws, saves; `argv` as on the command line. Returns the losses by phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("own-loop"), help="a folder")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 5, "num_heads": 4}
    model = maskdm.UViT(8, PATCH_SIZE, channels=1, num_classes=10, label_dropout=0, **sizes)
    average, losses = train(model, digits(), args.scale)

    # From here on it is a model like any other: a diffusers pipeline, a folder for the commands.
    diffusion = {"schedule": DIFFUSION.schedule, "prediction": DIFFUSION.prediction}
    pipeline = maskdm.MaskDMPipeline(average.eval(), None, diffusion, {"steps": 25})
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(args.out / "model")
    sheet(pipeline(60, seed=0).images).save(args.out / "samples.png")
    print(f"-> {args.out / 'samples.png'}, {args.out / 'model'}")
    return losses


if __name__ == "__main__":
    main()
