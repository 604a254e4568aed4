"""The generated pages: they say what the code says, and the check notices when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.cli import docs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A docs folder, freshly written."""
    assert docs.main(["--folder", str(tmp_path)]) == 0
    return tmp_path


def test_written_pages_pass_the_check(folder: Path) -> None:
    assert docs.main(["--folder", str(folder), "--check"]) == 0


def test_second_write_changes_nothing(folder: Path) -> None:
    assert docs.write(folder) == []


def test_changed_page_fails_the_check_and_is_not_touched(folder: Path, capsys) -> None:
    page = folder / "reference" / "recipe.md"
    page.write_text("old")
    assert docs.main(["--folder", str(folder), "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert page.read_text() == "old"


def test_card_of_a_method_that_is_gone_is_stale_and_removed(folder: Path) -> None:
    (folder / "methods" / "gone.md").write_text("x")
    assert docs.stale(folder) == ["methods/gone.md"]
    docs.write(folder)
    assert not (folder / "methods" / "gone.md").exists()


def test_recipe_page_names_every_key(folder: Path) -> None:
    text = (folder / "reference" / "recipe.md").read_text()
    for key in (
        "max_shard_bytes",
        "multiple_of",
        "perplexity_max",
        "loads_stock",
        "prompt_tokens",
        "trust_remote_code",
    ):
        assert f"`{key}`" in text


def test_command_page_names_every_command_and_its_options(folder: Path) -> None:
    text = (folder / "reference" / "cli.md").read_text()
    for words in ("## prunekit prune", "### prunekit recipes check", "## prunekit explain", "`--recipe`, `-r` (path)"):
        assert words in text


def test_pages_of_the_checkout_are_fresh() -> None:
    assert docs.stale(ROOT / "docs") == []
