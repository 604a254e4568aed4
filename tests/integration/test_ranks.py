"""The command in several processes: the plan of one, one voice, and one end where a rank fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prunekit.cli.main import main
from tests.ranks import together

Small = Callable[[str], Path]
COMMAND = ["-m", "prunekit"]


def recipe(folder: Path, model: Path, *steps: dict[str, object]) -> Path:
    file = folder / "recipe.yaml"
    calibrate = {"sequences": 5, "length_tokens": 24}
    file.write_text(json.dumps({"schema": 1, "model": {"source": str(model)}, "calibrate": calibrate, "steps": steps}))
    return file


def step(kind: str, by: dict[str, object], **budget: object) -> dict[str, object]:
    return {"remove": kind, "by": by, "budget": budget}


STEPS = (
    step("sublayers", {"search": "finercut", "distance": "loss", "swaps": 1}, units=2),
    step("blocks", {"score": "angular"}, units=1),
    step("neurons", {"score": "wanda"}, remove=0.3),
)


def test_two_ranks_write_the_plan_of_one(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = recipe(tmp_path, small("llama"), *STEPS)
    words = ["plan", "--recipe", str(asked), "--json", "--quiet", "-o"]
    first, second = together([*COMMAND, *words, str(tmp_path / "2.json")])
    assert (first.code, second.code) == (0, 0), first.err
    # As many threads as the launcher gives each process: sums depend on it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*words, str(tmp_path / "1.json")]) == 0
    torch.set_num_threads(threads)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert (second.out, second.err) == ("", "")
    one, two = json.loads(capsys.readouterr().out)["orders"], json.loads(first.out)["orders"]
    assert one[0]["steps"] == two[0]["steps"]
    assert one[0]["provenance"]["evaluations"] == two[0]["provenance"]["evaluations"]
    assert one[1:] == two[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json", "recipe.yaml"]


@pytest.mark.slow
def test_prune_on_two_ranks_writes_one_folder(small: Small, tmp_path: Path) -> None:
    asked = recipe(tmp_path, small("llama"), step("blocks", {"score": "block_influence"}, units=1))
    words = ["prune", "--recipe", str(asked), "-o", str(tmp_path / "o"), "--quiet"]
    first, second = together([*COMMAND, *words])
    assert (first.code, second.code) == (0, 0), first.err
    assert first.out.splitlines()[-1] == str(tmp_path / "o")
    assert (second.out, second.err) == ("", "")
    assert (tmp_path / "o" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o", "recipe.yaml"]


@pytest.mark.slow
def test_an_error_of_every_rank_is_told_once(tmp_path: Path) -> None:
    ended = together([*COMMAND, "plan", "--recipe", str(tmp_path / "none.yaml")])
    assert [one.code for one in ended] == [2, 2]
    assert "".join(one.err for one in ended).count("error:") == 1


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_of_one_rank_ends_all_with_its_message_and_code(small: Small, tmp_path: Path, failing: int) -> None:
    # Only one rank finds its output taken; the other waits for it in the search.
    asked = recipe(tmp_path, small("llama"), STEPS[0])
    (tmp_path / f"{failing}.json").write_text("{}")
    words = ["plan", "--recipe", str(asked), "--quiet", "-o", str(tmp_path / "{rank}.json")]
    ended = together([*COMMAND, *words])
    assert [one.code for one in ended] == [2, 2], ended
    assert [one.err.count("error:") for one in ended] == [int(rank == failing) for rank in range(2)]
    assert f"{failing}.json` exists" in ended[failing].err
    assert not (tmp_path / f"{1 - failing}.json").exists()


@pytest.mark.slow
def test_a_missed_expectation_of_the_first_rank_is_the_code_of_all(small: Small, tmp_path: Path) -> None:
    asked = recipe(tmp_path, small("llama"), step("blocks", {"score": "last_k"}, units=1))
    words = ["prune", "--recipe", str(asked), "-o", str(tmp_path / "o"), "--quiet", "--set", "expect.params_max=1"]
    ended = together([*COMMAND, *words])
    assert [one.code for one in ended] == [3, 3], ended
    assert [one.err.count("error:") for one in ended] == [1, 0]


@pytest.mark.slow
def test_verbs_that_share_nothing_are_refused(small: Small) -> None:
    ended = together([*COMMAND, "inspect", str(small("llama"))])
    assert [one.code for one in ended] == [2, 2]
    assert "".join(one.err for one in ended).count("`prunekit inspect` runs in one process") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others(small: Small, tmp_path: Path) -> None:
    asked = recipe(tmp_path, small("llama"), STEPS[0])
    dying = (
        "import os, sys\n"
        "import prunekit.search.finercut as finercut\n"
        "from prunekit.cli.main import main\n"
        "if os.environ['RANK'] == '1':\n"
        "    finercut.FinerCut.propose = lambda *given: os._exit(9)\n"
        f"sys.exit(main(['plan', '--recipe', {str(asked)!r}, '--quiet']))"
    )
    ended = together(["-c", dying])
    assert [one.code for one in ended] == [1, 9]
    assert "another process of this run is gone" in ended[0].err
