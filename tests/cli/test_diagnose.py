"""`prunekit diagnose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunekit.cli.diagnose import diagnose
from prunekit.core.errors import UsageError
from tests.tiny import BLOCKS, write_tiny


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads images, so that noise is its data and no tokenizer is needed."""
    return write_tiny("vit", tmp_path_factory.mktemp("vit") / "model")


def test_table_has_a_line_a_block_and_the_picture_is_the_last_line(invoke, vit, tmp_path) -> None:
    picture = tmp_path / "p.svg"
    done = invoke(diagnose, vit, "--quiet", "--plot", picture)
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[-1] == str(picture)
    assert [line.split()[0] for line in lines[-BLOCKS - 2 : -1]] == ["input", *map(str, range(BLOCKS))]
    assert picture.stat().st_size > 1000


def test_json_holds_every_value_of_what_was_asked(invoke, vit) -> None:
    done = invoke(diagnose, vit, "--quiet", "--json", "--only", "attention_rank", "--only", "sensitivity")
    assert done.exit_code == 0, done.exception
    data: dict[str, Any] = json.loads(done.stdout)
    assert [panel["name"] for panel in data["panels"]] == ["attention_rank", "sensitivity"]
    assert len(data["panels"][0]["values"]) == BLOCKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "attention_rnak"], "no diagnostic named `attention_rnak`"),
        (["--plot", "p.pdf"], "no picture"),
        (["--data", "wikitext2"], "no images named"),
    ],
)
def test_wrong_use_is_one_clear_error(invoke, vit, arguments, message) -> None:
    done = invoke(diagnose, vit, "--quiet", *arguments)
    assert isinstance(done.exception, UsageError)
    assert message in done.exception.what
