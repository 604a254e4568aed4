"""The HTML report of data pruning in a real browser: layout, contrast, names, and that it asks for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.web.pages import BASICS, CONTRAST

pytestmark = pytest.mark.browser

SCREENS = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]
LONG = "w" * 300 + " <script>window.pwned=1</script> " + "word " * 100


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of the reports of a data set of texts, and of one of images of which one is broken."""
    pytest.importorskip("pyarrow")
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": LONG if i == 3 else f"film {i}", "label": f"class-{'x' * 40}-{i % 3}"} for i in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rng = np.random.default_rng(0)
    for i in range(30):
        file = folder / "images" / ("dark" if i % 2 else "light") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        side = 400 if i == 4 else 16
        Image.fromarray(rng.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(file)
    (folder / "images" / "dark" / "broken.png").write_bytes(b"nothing")
    made = {"texts": (folder / "texts.jsonl", "length"), "images": (folder / "images", "random")}
    return {name: report(data, metric, folder / f"{name}.html") for name, (data, metric) in made.items()}


def report(data: Path, metric: str, page: Path) -> str:
    from prunekit.datasets.examples import Settings
    from prunekit.datasets.report import html_report
    from prunekit.datasets.rules import Rule
    from prunekit.datasets.score import Request, write_scores
    from prunekit.datasets.select import open_scores
    from prunekit.datasets.source import Reading

    scores = page.with_suffix(".parquet")
    settings = Settings(cache=page.parent / "cache")
    write_scores(Request(data, {metric: {}}, reading=Reading(skip_bad=True), settings=settings), scores)
    page.write_text(html_report(open_scores(scores), Rule(keep=0.5, rule="hard"))[0], encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def visit(browser: Any, reports: dict[str, str]) -> Iterator[Any]:
    """`visit(report, width, scheme)`: the page; afterwards no error, no message and no other request may have come."""
    heard: list[str] = []
    contexts = []

    def open_page(report: str, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda r: None if r.url.startswith((reports[report], "data:")) else heard.append(r.url))
        page.goto(reports[report])
        page.eval_on_selector_all("details", "all => all.forEach((d) => { d.open = true; })")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("report", ["texts", "images"])
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_page_fits_the_screen_and_can_be_read(visit: Any, report: str, width: int, scheme: str) -> None:
    page = visit(report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = page.evaluate(CONTRAST)
    assert found["bad"] == []
    assert found["seen"] > 60
    assert page.evaluate(BASICS) == []


def test_texts_are_shown_as_text_and_cut(visit: Any) -> None:
    page = visit("texts")
    assert page.locator("#hardest li").count() == page.locator("#easiest li").count() == 12
    assert page.evaluate("window.pwned") is None
    longest = page.locator("#hardest li").first.inner_text()
    assert "<script>" in longest
    assert "… 833 characters in all" in longest


def test_every_image_is_drawn(visit: Any) -> None:
    page = visit("images")
    sizes = page.eval_on_selector_all("img", "all => all.map((e) => [e.naturalWidth, e.clientWidth])")
    assert len(sizes) == 24
    assert all(natural in (16, 240) and drawn >= 100 for natural, drawn in sizes)
    assert "Left out, since they cannot be read: 1 of 31 images" in page.locator("#overview").inner_text()


def test_histogram_bars_say_what_they_count(visit: Any) -> None:
    page = visit("texts")
    heights = page.eval_on_selector_all("rect.gone", "all => all.map((e) => e.getBoundingClientRect().height)")
    assert len(heights) == 40
    assert max(heights) == pytest.approx(page.locator(".chart svg").bounding_box()["height"], abs=2)
    assert "examples" in page.locator("svg title").first.text_content()
