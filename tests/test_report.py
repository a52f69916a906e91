"""The report: one HTML file with the right numbers, that asks no network for anything."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_settings
from PIL import Image

from maskdm.cli import main
from maskdm.evaluation.neighbours import nearest_in_pixels
from maskdm.images.store import open_store
from maskdm.recipe import Recipe
from maskdm.report import page
from maskdm.report.charts import Band, Series, draw_chart, log_ticks, nice_ticks
from maskdm.report.judgement import by_chance, judged, judged_loss
from maskdm.report.pictures import embedded, spread
from maskdm.runs.lines import read_lines
from maskdm.training.trainer import train
from maskdm.words import figure, flops_text

SELF_CLOSING = {"meta", "img", "input", "br", "path"}


class Page(HTMLParser):
    """What a browser would make of a page: texts, cells of tables, attributes, scripts of data."""

    def __init__(self, html: str):
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.points: list[list[dict]] = []  # of each panel
        self.text, self.style, self.tags = "", "", list[str]()
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in SELF_CLOSING:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag not in SELF_CLOSING:
            assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.style += data
        elif self.open[-1:] == ["script"]:
            if data.strip().startswith("["):
                self.points.append(json.loads(data))
        else:
            self.text += data
            if {"td", "th"} & {*self.open}:
                self.rows[-1][-1] += data

    def row(self, title: str) -> list[str]:
        """The cells after that title."""
        return next(row[1:] for row in self.rows if row and row[0] == title)

    def line(self, name: str) -> dict:
        """The points of the first line of that name: over images, the first axis."""
        return next(one for panel in self.points for one in panel if one["name"] == name)


def read(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def settings(folder: Path, num_classes: int = 0) -> dict:
    """The tiny recipe on 60 digits, 7 of them held out; measured every 4 steps by 8 images."""
    made = tiny_settings()
    digits = open_store(Recipe(**made).data, progress=False)
    np.savez(folder / "digits.npz", digits.images[:60], digits.labels[:60])
    made["data"] |= {"source": str(folder / "digits.npz"), "held_out": 7}
    made["evaluation"] |= {"quick_num": 8, "metrics": ("frechet", "precision", "memorization")}
    made["model"] |= {"num_classes": num_classes}
    return made | {"evaluate_every": 4, "preview_every": 4, "preview_steps": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was measured, and evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    train(Recipe(**settings(folder)), folder / "one", show=False)
    assert main(["evaluate", str(folder / "one"), "--num", "12"]) == 0
    return folder / "one"


def test_training_and_evaluating_leave_a_report_with_the_figures_of_the_files(run):
    report, lines = read(run / "report.html"), read_lines(run / "metrics.jsonl")
    quality, plan = read_lines(run / "quality.jsonl"), json.loads((run / "plan.json").read_text())
    assert "finished" in report.text and "53 images" in report.text
    assert f"{plan['num_params']:,} parameters, 16 tokens an image" in report.text
    assert "53 of 60 images trained on; 7 held out" in report.text
    for name, num in (("hide", 6), ("show", 5)):
        losses = [line["loss"] for line in lines if line["stage"] == name]
        line = report.line(name)
        assert line["value"] == [figure(loss) for loss in losses]
        images = [line["images"] for line in lines if line["stage"] == name]
        np.testing.assert_allclose(line["x"], 100 * np.array(images) / 88, atol=0.01)
        title = "hide: 50 % hidden, 2x2 blocks" if name == "hide" else "show: whole images"
        assert report.row(title)[:2] == [f"{num} of {num}", f"{8 * num} of {8 * num}"]
    assert (
        report.row("in all")[2]
        == f"{flops_text(lines[-1]['flops'])} of {flops_text(plan['flops'])}"
    )
    assert plan["flops"] == lines[-1]["flops"] == sum(one["flops"] for one in plan["stages"])
    held_out = report.line("held-out images")["value"]
    assert held_out == [figure(line["dense_loss"]) for line in quality] and len(held_out) == 4
    record = json.loads((run / "evaluation.json").read_text())[-1]
    value, interval, words = report.row("Frechet distance")
    assert value == figure(record["metrics"]["frechet"]["value"])
    assert interval == " to ".join(map(figure, record["metrics"]["frechet"]["interval"]))
    assert f"distance by chance, {figure(by_chance('frechet', record))}" in words
    assert f"{record['memorization']['verdict']}." in report.text
    shown = [value for tag, name, value in report.attributes if (tag, name) == ("img", "alt")]
    steps = [re.search(r"step (\d+)", text)[1] for text in shown if "step" in text]
    assert steps == ["4", "6", "8", "11"]
    assert sum("beside the training image" in text for text in shown) == 1
    assert sum("under the mask" in text for text in shown) == 1
    axes = {value for tag, name, value in report.attributes if (tag, name) == ("div", "data-x")}
    assert axes == {"images", "flops", "time"}


def test_the_file_needs_no_network(run):
    report = read(run / "report.html")
    assert report.open == []
    for tag, name, value in report.attributes:
        if name in ("src", "href", "action", "poster", "data", "srcset"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:50])
        assert "//" not in value or value.startswith("data:image/"), (tag, name, value[:50])
    assert not {"link", "iframe", "object", "base"} & {*report.tags}
    assert "url(" not in report.style and "@import" not in report.style
    policy = [value for _, name, value in report.attributes if name == "content"]
    assert any(text.startswith("default-src 'none'; img-src data:") for text in policy)


def test_light_dark_phone_and_print_have_their_rules(run):
    style = read(run / "report.html").style
    for rule in ("prefers-color-scheme: dark", "max-width:46rem", "@media print"):
        assert rule in style


def test_names_are_text_and_never_markup(tmp_path):
    """Of folder, source, stages and classes; also inside the charts' data."""
    evil = "</script><script>alert(1)</script>"
    made = settings(tmp_path, num_classes=10) | {"evaluate_every": 0, "num_previews": 0}
    made["stages"][0] |= {"name": evil}
    folder = tmp_path / "<b>run"
    train(Recipe(**made), folder, show=False)
    names = [f"<img src=x onerror=alert({i})>" for i in range(10)]
    (folder / "classes.json").write_text(json.dumps(names))
    assert main(["report", str(folder)]) == 0
    report = read(folder / "report.html")
    assert report.open == [] and "b" not in report.tags
    assert report.tags.count("script") == 1 + len(report.points) == 4  # the page's, one a panel
    assert evil in report.text and names[0] in report.text and "<b>run" in report.text
    assert report.points[0][0]["name"] == evil
    assert not [one for one in report.attributes if one[1].startswith("on")]


def test_runs_without_measurements_and_unfinished_ones_are_reported(tiny, tmp_path):
    folder = tmp_path / "bare"
    train(Recipe(**{**tiny.model_dump(), "num_previews": 0}), folder, show=False)
    text = read(folder / "report.html").text
    assert "finished" in text and "Not evaluated yet" in text and "Previews" not in text
    for file in ("plan.json", "data.png"):  # a run of an earlier version
        (folder / file).unlink()
    (folder / "neighbours.png").write_bytes(b"damaged")
    lines = read_lines(folder / "metrics.jsonl")[:2]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder), "--out", str(tmp_path / "half.html")]) == 0
    half = read(tmp_path / "half.html")
    assert "unfinished: step 4 of 11" in half.text and "Samples beside" not in half.text
    assert half.row("hide: 50 % hidden, 2x2 blocks")[:2] == ["4 of 6", "32 of 48"]
    assert half.row("in all")[2] == flops_text(lines[-1]["flops"])  # nothing was planned
    (folder / "metrics.jsonl").unlink()
    assert main(["report", str(folder)]) == 0
    assert "no step logged yet" in read(folder / "report.html").text


def test_a_single_value_is_a_dot_and_values_that_are_not_finite_are_left_out():
    costs = {x: [1.0, 2.0, 3.0] for x in ("images", "flops", "time")}
    chart = draw_chart("t", [Series("a", costs, [float("nan"), 2.0, float("inf")])])
    (line,) = chart.panels[0].lines
    assert line["path"].startswith("M1000.0 ") and line["path"].endswith("h0.01")
    assert draw_chart("t", [Series("a", costs, [float("nan")] * 3)]) is None


def test_several_runs_stand_side_by_side(run, tmp_path):
    other = tmp_path / "two"
    made = Recipe(**settings(tmp_path) | {"seed": 1}).model_dump()
    shutil.copyfile(run.parent / "digits.npz", tmp_path / "digits.npz")
    made["data"]["source"] = str(run.parent / "digits.npz")
    train(Recipe(**made), other, show=False)
    assert main(["evaluate", str(other), "--num", "12"]) == 0
    out = tmp_path / "both.html"
    assert main(["report", str(run), str(other), "--out", str(out)]) == 0
    both = read(out)
    assert both.row("seed") == ["0", "1"] and both.row("state") == ["finished", "finished"]
    assert "data.source" not in both.text  # equal settings are not listed
    first = both.points[0]  # the first chart over images: a line for each run
    assert [line["name"] for line in first] == ["one", "two"]
    for line, folder in zip(first, (run, other), strict=True):
        expected = [figure(one["sliced"]) for one in read_lines(folder / "quality.jsonl")]
        assert line["value"] == expected
    cells = both.row("Frechet (pca)")
    values = [
        json.loads((folder / "evaluation.json").read_text())[-1]["metrics"]["frechet"]["value"]
        for folder in (run, other)
    ]
    for cell, value in zip(cells, values, strict=True):
        assert float(cell.split(" ± ")[0].replace(",", "")) == pytest.approx(value, rel=0.05)
    assert re.search(r"Frechet \(pca\): (one|two) ", both.text)


def test_runs_that_are_not_comparable_say_why(run, tiny, tmp_path):
    made = settings(tmp_path)
    np.savez(tmp_path / "digits.npz", np.load(run.parent / "digits.npz")["arr_0"][::-1])
    train(Recipe(**made), tmp_path / "other", show=False)
    assert (
        main(["report", str(run), str(tmp_path / "other"), "--out", str(tmp_path / "r.html")]) == 0
    )
    text = read(tmp_path / "r.html").text
    assert "is not comparable between these runs: they differ in images (SHA-256)" in text


def test_a_report_that_fails_ends_no_training_and_is_said(tiny, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("the template\nis broken")

    monkeypatch.setattr(page, "report_html", fails)
    assert train(tiny, tmp_path / "run").finished
    text = capsys.readouterr().out
    assert "report.html could not be written: the template is broken" in text
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_what_cannot_be_reported_is_one_line(run, tmp_path, capsys):
    for arguments, expected in (
        ([], "name a run"),
        ([str(tmp_path)], "is not a run's folder .it has no recipe.yaml"),
        ([str(tmp_path / "none")], "is not a run's folder .it does not exist"),
        ([str(run), str(run)], "named twice"),
        ([str(run), "--out", str(tmp_path / "r.pdf")], "ends in .html"),
    ):
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(expected, error) and error.count("\n") == 1, error


# Charts and pictures


def test_ticks_are_round_and_few():
    assert nice_ticks(0, 204) == [0, 50, 100, 150, 200]
    assert nice_ticks(0.0081, 0.0162) == [0.01, 0.012, 0.014, 0.016]
    assert log_ticks(0.015, 0.3) == [0.02, 0.05, 0.1, 0.2]
    assert log_ticks(1e-6, 1e6)[::2][:2] == [1e-6, 1e-2] or len(log_ticks(1e-6, 1e6)) <= 6
    for low, high in ((1e-9, 3e-9), (-5, 7), (0, 1e15)):
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 6 and low <= ticks[0] and ticks[-1] <= high
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_lines_bands_and_intervals_lie_where_their_values_are():
    """Linear from 0 to 100 and back: places follow from the ticks."""
    costs = {"images": [0, 500, 1000], "flops": [0, 5e11, 1e12], "time": [0, 60, 90]}
    halves = {x: (0.0, column[1]) for x, column in costs.items()}
    chart = draw_chart("t", [Series("a", costs, [10, 12, 11], [1, 1, 1])], [Band("first", halves)])
    for panel, part in zip(chart.panels, (0.5, 0.5, 2 / 3), strict=True):
        at = np.array(re.findall(r"[\d.]+", panel.lines[0]["path"]), float).reshape(-1, 2)
        np.testing.assert_allclose(at[:, 0], [0, 1000 * part, 1000], atol=0.1)
        (low, low_text), (high, high_text) = panel.y_ticks[0], panel.y_ticks[-1]
        slope = (high - low) / (float(high_text) - float(low_text))  # percent a unit
        expected = [10 * (low + slope * (value - float(low_text))) for value in (10, 12, 11)]
        np.testing.assert_allclose(at[:, 1], expected, atol=0.2)
        band = np.array(re.findall(r"[\d.]+", panel.areas[0]["path"]), float).reshape(-1, 2)
        np.testing.assert_allclose(band[5, 1] - band[0, 1], -10 * slope * 2 * 1.96, atol=0.3)
        assert panel.bands[0]["left"] == 0 and panel.bands[0]["width"] == pytest.approx(
            100 * part, 1e-3
        )
    assert [panel.x_title.split(", ")[-1] for panel in chart.panels] == [
        "images seen",
        "GFLOP",
        "seconds",
    ]


def test_long_lines_are_averaged_to_a_few_hundred_points():
    values = np.arange(10_000.0)
    chart = draw_chart("t", [Series("a", {x: values for x in ("images", "flops", "time")}, values)])
    assert len(chart.panels[0].points[0]["x"]) == 240
    first = float(chart.panels[0].points[0]["value"][0])
    assert first == pytest.approx(values[:42].mean(), abs=0.5)


def test_large_pictures_are_compressed_again_and_few_are_chosen(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    Image.fromarray(pixels[:20, :20]).save(tmp_path / "small.png")
    large, small = (embedded(tmp_path / f"{name}.png", name) for name in ("large", "small"))
    assert (large.width, large.height) == (500, 400) and not large.source.startswith(
        "data:image/png"
    )
    assert len(large.source) < (tmp_path / "large.png").stat().st_size
    assert small.source.startswith("data:image/png;base64,")
    assert embedded(tmp_path / "none.png", "") is None
    assert spread(range(100), 4) == [0, 33, 66, 99] and spread([1, 2], 4) == [1, 2]


def test_the_nearest_image_is_that_of_an_exhaustive_search():
    generator = np.random.default_rng(0)
    train_images = generator.integers(0, 256, (50, 4, 6, 3), dtype=np.uint8)
    samples = generator.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    samples[0], samples[1] = train_images[7], train_images[9][:, ::-1]
    for flip in (False, True):
        near = nearest_in_pixels(samples, train_images, flip)
        both = [train_images, train_images[:, :, ::-1]] if flip else [train_images]
        every = np.concatenate(both).astype(float)
        gaps = np.sqrt(((samples[:, None] - every) ** 2).mean((2, 3, 4)))
        np.testing.assert_allclose(near.difference, gaps.min(1), rtol=1e-6)
        assert np.array_equal(near.images, every[gaps.argmin(1)])
    assert near.difference[:2].tolist() == [0, 0]


def test_figures_are_judged_in_plain_words():
    record = {"chance": {"frechet": 2.0, "num": 500}, "samples": {"num": 500}}
    record["reference"] = {"num": 500}
    for value, expected in (
        (1.5, "As near as as many other real images would be"),
        (3, "Very near: 1.5 times"),
        (9, "Near: 4.5"),
    ):
        assert judged("frechet", {"value": value}, record).startswith(expected)
    # It falls as 1/N + 1/M: 10,000 samples of a perfect model are nearer than two sets of 500.
    more = record | {"samples": {"num": 10_000}, "reference": {"num": 1000}}
    expected = 2.0 * (1 / 10_000 + 1 / 1000) / (2 / 500)
    assert by_chance("frechet", more) == pytest.approx(expected) == pytest.approx(0.55)
    assert "Very near: 1.8 times" in judged("frechet", {"value": 1.0}, more)
    assert "Far off: 150 times" in judged("frechet", {"value": 300}, record)
    assert (
        judged("precision", {"value": 0.71}, {}) == "71 of 100 samples lie among the real images."
    )
    assert "No difference" in judged("kid", {"value": 0.1, "interval": [-1, 1]}, {})
    assert judged("from elsewhere", {"value": 1}, {}) == ""
    assert judged_loss({"dense_loss": 1.0, "dense_loss_train": 1.0}).endswith("memorising.")
    assert "10 % more" in judged_loss({"dense_loss": 1.1, "dense_loss_train": 1.0})


# In a real browser


def test_axis_slider_and_values_work_in_a_browser(run, browser):
    requests, errors = list[str](), list[str]()
    for width in (1200, 390):
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.on("request", lambda request: requests.append(request.url))
        shown.on("pageerror", lambda error: errors.append(str(error)))
        shown.goto((run / "report.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        assert shown.locator(".panel[data-x=images]").first.is_visible()
        shown.get_by_role("button", name="FLOPs").click()
        assert shown.locator(".panel[data-x=flops]").first.is_visible()
        assert not shown.locator(".panel[data-x=images]").first.is_visible()
        frames = shown.locator(".frame")
        assert [frames.nth(i).is_visible() for i in range(4)] == [False, False, False, True]
        shown.get_by_label("Step of the preview").fill("0")
        assert [frames.nth(i).is_visible() for i in range(4)] == [True, False, False, False]
        plot = shown.locator(".panel[data-x=flops] .plot").first
        plot.scroll_into_view_if_needed()
        plot.hover()
        assert re.search(
            r"FLOP\d.*(hide|show)", plot.locator(".tip").inner_text().replace("\n", "")
        )
        shown.close()
    assert errors == []
    assert all(url.startswith(("file:", "data:")) for url in requests)


def test_the_page_follows_dark_and_light(run, browser):
    grounds = set()
    for scheme in ("light", "dark"):
        shown = browser.new_page(color_scheme=scheme)
        shown.goto((run / "report.html").as_uri())
        grounds.add(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
        shown.close()
    assert len(grounds) == 2
