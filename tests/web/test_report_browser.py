"""The HTML report in a real browser: layout, keyboard, contrast, names, and that it asks for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunekit.report.html import html_report
from prunekit.report.run import read_run
from tests.runs import BLOCKS, manifest, old_manifest, write_run
from tests.web.pages import BASICS, CONTRAST

pytestmark = pytest.mark.browser

HOSTILE = "<script>window.pwned=1</script>\"'><img src=x onerror=window.pwned=1>"
SCREENS = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]

FOCUSABLE = """() => [...document.querySelectorAll("a[href], button, input, summary, [tabindex='0']")]
  .filter((e) => e.checkVisibility()).length"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of the reports of a whole run, an old one and a hostile one."""
    found = {}
    for name, data in {"whole": manifest(), "old": old_manifest(), "hostile": manifest(HOSTILE)}.items():
        folder = write_run(tmp_path_factory.mktemp(name), data)
        file = folder / "report.html"
        file.write_text(html_report(read_run(folder)), encoding="utf-8")
        found[name] = Path(file).as_uri()
    return found


@pytest.fixture
def visit(browser: Any, reports: dict[str, str]) -> Iterator[Any]:
    """`visit(report, width, scheme)`: the page; afterwards no error, no message and no other request may have come."""
    heard: list[str] = []
    contexts = []

    def open_page(report: str = "whole", width: int = 1280, scheme: str = "light") -> Any:
        size = {"width": width, "height": 800}
        context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
        page.on("request", lambda r: None if r.url == reports[report] else heard.append(f"request: {r.url}"))
        page.goto(reports[report])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("report", ["whole", "old", "hostile"])
@pytest.mark.parametrize("width", [320, 360, 1280])
def test_page_is_never_wider_than_the_screen(visit: Any, report: str, width: int) -> None:
    page = visit(report, width)
    page.eval_on_selector_all("details", "all => all.forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What does not fit scrolls in its own box instead of being cut off.
    cut = "all => all.filter((e) => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'hidden').length"
    assert page.eval_on_selector_all("section, table, pre, figure, li", cut) == 0


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("report", ["whole", "old"])
def test_text_has_enough_contrast(visit: Any, report: str, width: int, scheme: str) -> None:
    page = visit(report, width, scheme)
    page.eval_on_selector_all("details", "all => all.forEach((d) => { d.open = true; })")
    found = page.evaluate(CONTRAST)
    assert found["bad"] == []
    assert found["seen"] > 60


def test_contrast_check_notices_pale_text(visit: Any) -> None:
    page = visit()
    page.eval_on_selector("h1", "e => { e.style.color = '#bbb'; }")
    assert [text for _, text, _ in page.evaluate(CONTRAST)["bad"]] == ["a run"]


def test_schemes_differ(visit: Any) -> None:
    colours = [visit(scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark")]
    assert colours[0] != colours[1]


@pytest.mark.parametrize("report", ["whole", "old", "hostile"])
@pytest.mark.parametrize("width", [360, 1280])
def test_names_headings_and_landmarks(visit: Any, report: str, width: int) -> None:
    assert visit(report, width).evaluate(BASICS) == []


@pytest.mark.parametrize("width", [360, 1280])
def test_tab_reaches_every_control_in_order_and_shows_it(visit: Any, width: int) -> None:
    page = visit(width=width)
    page.eval_on_selector_all("details", "all => all.forEach((d) => { d.open = true; })")
    count = page.evaluate(FOCUSABLE)
    reached = []
    for _ in range(count):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("""() => {
              const e = document.activeElement;
              e.dataset.turn ??= document.querySelectorAll("[data-turn]").length;
              const style = getComputedStyle(e);
              return [e.dataset.turn, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2, e.tagName];
            }""")
        )
    assert [turn for turn, _, _ in reached] == [str(i) for i in range(count)]
    assert all(visible for _, visible, _ in reached), reached
    assert {tag for _, _, tag in reached} >= {"A", "BUTTON", "INPUT", "SUMMARY", "PRE", "DIV"}


def test_chart_is_read_with_the_keyboard(visit: Any) -> None:
    page = visit()
    slider, output = page.locator("#step-1"), page.locator("output")
    slider.focus()
    page.keyboard.press("Home")
    assert output.inner_text() == "0: nothing: the dense model, distance 0"
    page.keyboard.press("ArrowRight")
    assert output.inner_text() == "1: blocks.3.attention, distance 0.0123"
    assert slider.get_attribute("aria-valuetext") == output.inner_text()
    assert page.locator(".dot.on").get_attribute("data-step") == "1"
    page.keyboard.press("End")
    assert output.inner_text() == "3: blocks.9.attention, blocks.9.ffn, distance infinite"


def test_chart_is_read_with_the_pointer(visit: Any) -> None:
    page = visit()
    box = page.locator("[data-area]").bounding_box()
    page.locator("[data-area]").hover(position={"x": box["width"] * 2 / 3, "y": box["height"] / 2})
    assert page.locator("output").inner_text() == "2: blocks.7.ffn, distance 0.0312"


def test_copy_gives_the_whole_recipe(visit: Any) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy recipe").press("Enter")
    page.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.locator("#recipe-text").inner_text()
    assert copied.startswith("schema: 1\nname: a run\n")


def test_hostile_text_is_shown_and_does_nothing(visit: Any) -> None:
    page = visit("hostile")
    assert page.evaluate("window.pwned") is None
    assert page.locator("h1").inner_text() == f"a run{HOSTILE}"
    assert page.locator("blockquote").first.inner_text() == f"there was a cat{HOSTILE}"
    assert page.locator("img").count() == 0


def test_only_the_pages_own_script_may_run(visit: Any, reports: dict[str, str], browser: Any, tmp_path: Path) -> None:
    """Even where escaping failed, the page's policy stops a script."""
    page = visit("whole")
    file = tmp_path / "broken.html"
    file.write_text(page.content().replace("</h1>", "</h1><script>window.pwned = 1</script>", 1), encoding="utf-8")
    other = browser.new_page()
    other.goto(file.as_uri())
    assert other.evaluate("window.pwned") is None
    assert other.locator("output").inner_text() != ""
    other.close()


def test_layer_map_says_every_block_in_words(visit: Any) -> None:
    page = visit()
    blocks = page.locator(".map > li")
    assert blocks.count() == BLOCKS
    # textContent: what a screen reader gets, hidden words included.
    assert "attention narrowed: 2 of 3 kv groups" in blocks.nth(1).text_content()
    assert "FFN removed" in blocks.nth(7).text_content()


def test_print_unfolds_tables_and_drops_controls(visit: Any) -> None:
    page = visit(scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST)["bad"] == []
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
