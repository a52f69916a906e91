"""The page itself: Gradio's widgets, and what happens when they are used."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from maskdm.app.drawing import Drawing, Wanted, inpainted, marginal, sampled
from maskdm.app.limits import Limits
from maskdm.app.models import IN_TURN, Models
from maskdm.app.pictures import canvas, download_files, painted, sheet, uploaded
from maskdm.app.watching import ESTIMATE, NOISY, Frame, watched
from maskdm.families import MASKS, SAMPLERS
from maskdm.recipe import Mask, Sampling
from maskdm.words import clock, one_line

CACHE_SEC = (600, 3600)  # how often Gradio's files are looked through, and their age at most
DRAWING = "drawing"  # the queue of all drawings: one at a time
CSS = """
.maskdm-picture img { image-rendering: pixelated; }
footer { display: none !important; }
"""
MARK = "rgba(232, 89, 12, 0.75)"  # of what is painted over
NUM_SAMPLES, NUM_RESULTS, NUM_RESAMPLINGS = 16, 4, 5  # at first


@dataclass(frozen=True)
class Page:
    """What the parts of the page share.

    Attributes:
        models: what it draws from.
        limits: how much.
        folder: for files to download.
    """

    models: Models
    limits: Limits
    folder: Path


@dataclass(frozen=True)
class Panel:
    """A picture on the page, with a line and downloads below."""

    column: gr.Column
    caption: gr.Markdown
    picture: gr.Image
    png: gr.DownloadButton
    npz: gr.DownloadButton


@dataclass(frozen=True)
class Taken:
    """An image to be inpainted: uint8 (H, W, C)."""

    image: np.ndarray


def build_page(page: Page) -> gr.Blocks:
    """The page with its queue: one drawing at a time, few that wait, no telemetry."""
    with gr.Blocks(
        title="maskdm", analytics_enabled=False, delete_cache=CACHE_SEC, fill_width=True
    ) as blocks:
        gr.Markdown(f"# maskdm\nDraws from {', '.join(f'`{name}`' for name in page.models.given)}.")
        with gr.Tab("Sample"):
            _add_sampling(page)
        with gr.Tab("Inpaint"):
            _add_inpainting(page)
        with gr.Tab("Marginals"):
            _add_marginals(page)
    return blocks.queue(
        max_size=page.limits.max_waiting, default_concurrency_limit=1, api_open=False
    )


def _add_sampling(page: Page) -> None:
    """Images of one seed, from one model or from several side by side."""
    models = page.models
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            chosen = gr.CheckboxGroup(
                models.names,
                value=models.given,
                label="Models, with the same seed side by side",
                visible=len(models.names) > 1,
            )
            values = _settings(page, _own(models), NUM_SAMPLES)
            show, go, stop = _buttons("Draw")
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                panels = {name: _panel(name, name in models.given) for name in models.names}

    def draw(names: list[str], show: str, *values: Any) -> Iterator[dict]:
        with _refusals():
            wanted = _wanted(*values)
            names = [name for name in models.names if name in names]
            if not names:
                raise ValueError("no model is chosen: choose at least one")
            drawings = [sampled(models, name, wanted, page.limits) for name in names]
            yield {panel.column: gr.Column(visible=name in names) for name, panel in panels.items()}
            for drawing in drawings:
                yield from _drawn(page, drawing, show, panels[drawing.name])

    _connect(go, stop, draw, [chosen, show, *values], [*panels.values()])


def _add_inpainting(page: Page) -> None:
    """An image, a mask that is painted on it, and what the model draws there."""
    models = page.models
    taken = gr.State()
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            name = gr.Dropdown(models.names, value=models.given[0], label="Model")
            with gr.Row():
                number = gr.Number(0, label="Image number", precision=0, minimum=0, min_width=110)
                with gr.Column(min_width=150):
                    training = gr.Button("Training image", size="md")
                    drawn = gr.Button("Sampled image", size="md")
            upload = gr.UploadButton(
                "Upload an image", file_types=["image"], type="filepath", size="md"
            )
            editor = _editor()
            values = _settings(page, _own(models).for_inpainting(), NUM_RESULTS, True)
            resamplings = gr.Slider(
                1, 20, NUM_RESAMPLINGS, step=1, label="Resamplings", info="More fit better."
            )
            show, go, stop = _buttons("Inpaint")
        with gr.Column(scale=2, min_width=320):
            panel = _panel("The image with its hole, and the results", True)

    def draw(
        name: str,
        taken: Taken | None,
        edited: dict[str, Any] | None,
        resamplings: int,
        show: str,
        *values: Any,
    ) -> Iterator[dict]:
        with _refusals():
            if taken is None:
                raise ValueError("there is no image yet: take one, then paint over a part of it")
            layers = (edited or {}).get("layers", [])
            unknown = painted(layers, *taken.image.shape[:2])
            how = (taken.image, unknown, int(resamplings), page.limits)
            drawing = inpainted(models, name, _wanted(*values), *how)
            yield from _drawn(page, drawing, show, panel)

    _connect_taking(page, name, number, values[0], (training, drawn, upload), [taken, editor])
    inputs = [name, taken, editor, resamplings, show, *values]
    _connect(go, stop, draw, inputs, [panel])


def _connect_taking(
    page: Page,
    name: gr.Dropdown,
    number: gr.Number,
    seed: gr.Number,
    buttons: tuple[gr.Button, gr.Button, gr.UploadButton],
    where: list[Any],
) -> None:
    """Lets buttons take an image, to be painted on: a training image, a sampled or an own one."""
    models, (training, drawn, upload) = page.models, buttons

    def take(image: np.ndarray) -> tuple[Taken, dict]:
        return Taken(image), {"background": canvas(image), "layers": [], "composite": None}

    def take_upload(path: str, name: str) -> tuple[Taken, dict]:
        with _refusals():
            preparation = models.load(name).preparation
            return take(uploaded(Path(path), preparation, page.limits))

    def take_training(number: int | None, name: str) -> tuple[Taken, dict]:
        with _refusals():
            return take(models.training_image(name, _whole("image number", number)))

    def take_sampled(number: int | None, name: str, seed: int | None) -> tuple[Taken, dict]:
        with _refusals():
            index = _whole("image number", number)
            return take(_one_sample(page, name, index, _whole("seed", seed)))

    one_at_a_time = {"concurrency_id": DRAWING, "api_visibility": "private"}
    training.click(take_training, [number, name], where, **one_at_a_time)
    drawn.click(take_sampled, [number, name, seed], where, **one_at_a_time)
    upload.upload(take_upload, [upload, name], where, **one_at_a_time)


def _add_marginals(page: Page) -> None:
    """The patches that a mask leaves visible, drawn without the others."""
    models = page.models
    first = (models.primers or models.given)[0]
    mask = models.shown(first).mask
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            gr.Markdown(
                "A model trained under masks draws any part of an image by itself: the patches "
                "that a mask leaves visible. `@STAGE` is a model at the end of a masked stage."
            )
            name = gr.Dropdown(models.names, value=first, label="Model")
            kinds = [kind for kind in MASKS if kind != "none"]
            kind = gr.Dropdown(kinds, value=mask.kind, label="Mask")
            rate = gr.Slider(0.05, 0.95, mask.rate, step=0.01, label="Fraction hidden")
            block = gr.Number(
                mask.block, label="Side of a block", precision=0, minimum=1, info="Of kind block."
            )
            values = _settings(page, _own(models), NUM_SAMPLES)
            show, go, stop = _buttons("Draw")
        with gr.Column(scale=2, min_width=320):
            panel = _panel("What the masks leave visible", True)

    def draw(
        name: str, kind: str, rate: float, block: int | None, show: str, *values: Any
    ) -> Iterator[dict]:
        with _refusals():
            mask = Mask(kind=kind, rate=rate, block=_whole("side of a block", block))
            drawing = marginal(models, name, _wanted(*values), mask, page.limits)
            yield from _drawn(page, drawing, show, panel)

    def usual(name: str) -> tuple[str, float, int]:
        mask = models.shown(name).mask
        return mask.kind, mask.rate, mask.block

    name.change(usual, name, [kind, rate, block], queue=False, api_visibility="private")
    inputs = [name, kind, rate, block, show, *values]
    _connect(go, stop, draw, inputs, [panel])


def _drawn(page: Page, drawing: Drawing, show: str, panel: Panel) -> Iterator[dict]:
    """A drawing on its panel while it runs, then its downloads."""
    lead = drawing.lead
    for frame in watched(drawing, show):
        picture = sheet(np.concatenate([lead, frame.images]))
        yield {panel.picture: picture, panel.caption: _progress(drawing, frame)}
    name = f"{drawing.name.replace('/', '-')}-seed{drawing.seed}"
    png, npz = download_files(frame.images, lead, drawing.classes(), page.folder, name)
    yield {
        panel.png: gr.DownloadButton(value=str(png), interactive=True),
        panel.npz: gr.DownloadButton(value=str(npz), interactive=True),
    }


def _progress(drawing: Drawing, frame: Frame) -> str:
    if frame.is_last:
        return f"{drawing.text()}, in {frame.elapsed_sec:.1f} s"
    left = f", {clock(frame.remaining_sec)} left" if frame.part else ""
    return f"{100 * frame.part:.0f} %{left}"


def _one_sample(page: Page, name: str, index: int, seed: int) -> np.ndarray:
    """The image with that number of a seed, by the model's own settings: uint8 (H, W, C)."""
    own = page.models.load(name).sampling
    wanted = Wanted(seed, 1, own.steps, own.sampler, own.guidance.kind, own.guidance.scale)
    drawing = sampled(page.models, name, wanted, page.limits)
    return replace(drawing, first=index).draw()[0]


def _own(models: Models) -> Sampling:
    """How the first model is sampled by default."""
    return models.load(models.given[0]).sampling


def _settings(page: Page, own: Sampling, num: int, is_inpainting: bool = False) -> list[Any]:
    """Widgets in the order of `Wanted`."""
    limits, classes = page.limits, page.models.classes()
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
        num_steps = min(own.steps, limits.max_steps)
        steps = gr.Number(num_steps, label="Steps", precision=0, minimum=1, min_width=110)
    count = gr.Slider(1, limits.max_images, min(num, limits.max_images), step=1, label="Images")
    sampler = gr.Dropdown(
        [*SAMPLERS], value=own.sampler, label="Sampler", visible=not is_inpainting
    )
    with gr.Row():
        kinds = page.models.guidance_kinds()
        guidance = gr.Dropdown(kinds, value=own.guidance.kind, label="Guidance", min_width=150)
        scale = gr.Number(
            own.guidance.scale, label="Scale", info="1 = none", step=0.1, minimum=0, min_width=110
        )
    label = gr.Dropdown(
        classes or [("all in turn", IN_TURN)], value=IN_TURN, label="Class", visible=bool(classes)
    )
    return [seed, count, steps, sampler, guidance, scale, label]


def _wanted(
    seed: int | None,
    num: int,
    steps: int,
    sampler: str,
    guidance: str,
    scale: float | None,
    label: int,
) -> Wanted:
    """What the widgets say. Raises ValueError for an empty one."""
    if scale is None:
        raise ValueError("the guidance has no scale: give a number, 1 = no guidance")
    numbers = (_whole("seed", seed), _whole("images", num), _whole("steps", steps))
    return Wanted(*numbers, sampler, guidance, float(scale), int(label))


def _whole(name: str, value: float | None) -> int:
    if value is None or value != int(value):
        raise ValueError(f"{name}: give a whole number")
    return int(value)


def _buttons(text: str) -> tuple[gr.Radio, gr.Button, gr.Button]:
    show = gr.Radio([NOISY, ESTIMATE], value=NOISY, label="Show while it draws")
    with gr.Row():
        go = gr.Button(text, variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=120)
    return show, go, stop


def _panel(name: str, is_visible: bool) -> Panel:
    with gr.Column(min_width=300, visible=is_visible) as column:
        gr.Markdown(f"**{name}**")
        picture = gr.Image(
            show_label=False,
            format="png",
            interactive=False,
            buttons=["fullscreen"],
            elem_classes="maskdm-picture",
        )
        caption = gr.Markdown()
        with gr.Row():
            png = gr.DownloadButton("Grid (.png)", interactive=False, size="sm", min_width=110)
            npz = gr.DownloadButton("Array (.npz)", interactive=False, size="sm", min_width=110)
    return Panel(column, caption, picture, png, npz)


def _editor() -> gr.ImageEditor:
    """Where a mask is painted: a brush and an eraser over the image that was taken."""
    gr.Markdown("Take an image, then paint over what is to be drawn anew.")
    return gr.ImageEditor(
        show_label=False,
        type="numpy",
        image_mode="RGBA",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        buttons=[],
        brush=gr.Brush(default_size=40, colors=[MARK], default_color=MARK, color_mode="fixed"),
        eraser=gr.Eraser(default_size=40),
        canvas_size=(512, 512),
        elem_classes="maskdm-picture",
    )


def _connect(
    go: gr.Button, stop: gr.Button, draw: Any, inputs: list[Any], panels: list[Panel]
) -> None:
    """Lets one button start a drawing on panels, and another end it."""
    outputs = [widget for panel in panels for widget in vars(panel).values()]
    started = go.click(
        draw,
        inputs,
        outputs,
        show_progress="hidden",
        concurrency_id=DRAWING,
        concurrency_limit=1,
        api_visibility="private",
    )
    stop.click(None, cancels=[started])


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Shows what was refused as one line on the page."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise gr.Error(
            html.escape(one_line(error, 300)),
            duration=20,
            print_exception=not isinstance(error, ValueError),  # it may be a defect
        ) from error
