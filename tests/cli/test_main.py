"""The command line as a whole: help without heavy imports, errors, exit codes, completion."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from prunekit.cli import _errors
from prunekit.cli import main as main_module
from prunekit.cli._progress import LineProgress
from prunekit.cli.main import build, main, summary, verbs
from prunekit.core.errors import ExpectationError, UsageError

ROOT = Path(__file__).resolve().parents[2]
VERBS = [
    "prune",
    "inspect",
    "score",
    "costs",
    "plan",
    "apply",
    "heal",
    "export",
    "verify",
    "reproduce",
    "evaluate",
    "compare",
    "report",
    "diagnose",
    "recipes",
    "methods",
    "explain",
]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python process."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Lets every run end in this error."""

    def raises(**arguments: object) -> None:
        raise error

    monkeypatch.setattr(main_module, "build", lambda load: raises)


def test_help_lists_every_verb_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for verb in VERBS:
        assert f"{verb} {summary(verb)}" in text


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_needs_no_heavy_import(arguments: list[str]) -> None:
    done = python(
        "import sys\n"
        "from prunekit.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'yaml', 'onnx'} & set(sys.modules)\n"
        "verbs = [m for m in sys.modules if m.startswith('prunekit.cli.') and '_' not in m and m[13:] != 'main']\n"
        "print(code, sorted(heavy), sorted(verbs))"
    )
    assert done.stdout.splitlines()[-1] == "0 [] []"


def test_help_of_a_verb_imports_only_that_verb_and_no_torch() -> None:
    done = python(
        "import sys\n"
        "from prunekit.cli.main import main\n"
        "main(['inspect', '--help'])\n"
        "print(sorted(m for m in ('torch', 'transformers', 'prunekit.cli.plan', 'prunekit.cli.inspect')"
        " if m in sys.modules))"
    )
    assert done.stdout.splitlines()[-1] == "['prunekit.cli.inspect']"


def test_every_file_of_the_folder_is_a_verb_in_the_order_of_work() -> None:
    assert verbs()[: len(VERBS)] == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_a_first_line_and_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary(verb).endswith(".")
    assert main([verb, "--help"]) == 0
    assert f"Usage: prunekit {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_imports_torch_at_its_top(verb: str) -> None:
    tree = ast.parse((ROOT / "prunekit" / "cli" / f"{verb}.py").read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not [name for name in top if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxruntime")]


def test_unknown_verb_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prun", "--output", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[:2] == [
        "error: no command `prun`",
        f"  hint: did you mean `prune`? `prunekit --help` lists all {len(verbs())}",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["score", "x"], "missing option `--method`"),
        (["prune", "--outptu", "x"], "`--outptu`"),
        (["prune", "x", "--fraction", "abc"], "`--fraction`"),
        (["prune", "x", "y"], "unexpected extra argument"),
        (["recipes", "nope"], "no such command `nope`"),
        (["--nope"], "`--nope`"),
    ],
)
def test_wrong_usage_is_one_error_of_ours(arguments, words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err.splitlines()[0]
    assert "--help` shows what there is" in err


def test_error_has_four_parts_on_stderr(monkeypatch, capsys) -> None:
    fails_with(monkeypatch, UsageError("this broke", why="a reason", hint="one\ntwo", at="file:3"))
    assert main(["plan"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: this broke\n  why: a reason\n  hint: one\n    two\n  at: file:3\n"


def test_error_as_json_is_one_document_on_stdout(monkeypatch, capsys) -> None:
    fails_with(monkeypatch, UsageError("this broke", hint="mend it"))
    assert main(["plan", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "error": {"what": "this broke", "why": "", "hint": "mend it", "at": ""},
        "exit_code": 2,
    }
    assert err == ""


def test_missed_expectation_leaves_the_json_on_stdout_alone(monkeypatch, capsys) -> None:
    fails_with(monkeypatch, ExpectationError("one missed"))
    assert main(["prune", "--json"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: one missed\n"


def test_problems_of_a_recipe_are_listed_one_by_one(tmp_path: Path, capsys) -> None:
    (tmp_path / "r.yaml").write_text("schema: 1\nmodle: {}\n")
    assert main(["plan", "--recipe", str(tmp_path / "r.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 3
    assert f"  at: {tmp_path}/r.yaml:2, modle\n" in err


def test_problems_of_a_recipe_as_json_have_their_lines(tmp_path: Path, capsys) -> None:
    (tmp_path / "r.yaml").write_text("schema: 1\nmodle: {}\n")
    assert main(["plan", "--json", "--recipe", str(tmp_path / "r.yaml")]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [p["line"] for p in problems if "modle" in p["what"]] == [2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), typer.Abort()])
def test_interruption_ends_with_130(stop, monkeypatch, capsys) -> None:
    fails_with(monkeypatch, stop)
    assert main(["plan"]) == 130
    assert "error: interrupted" in capsys.readouterr().err


def test_interruption_inside_an_executed_string_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(
        "import sys\n"
        "from prunekit.cli import main\n"
        "def stops(**arguments): exec('raise KeyboardInterrupt')\n"
        "main.build = lambda load: stops\n"
        # Once without counting, because what the first error imports hides what is looked for.
        "main.main(['plan'])\n"
        "sys.exit(main.main(['plan']))\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    ended = subprocess.run(
        [sys.executable, "-m", "stopped"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ended.returncode == 130, ended.stderr
    assert "interrupted" in ended.stderr


def test_interruption_inside_a_verb_ends_with_130(monkeypatch, capsys) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("plan")(interrupted)
    monkeypatch.setattr(main_module, "build", lambda load: app)
    assert main(["plan"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interruption_that_a_destructor_swallows_stops_at_the_next_step(monkeypatch, capsys) -> None:
    done = []

    class Gone:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def works() -> None:
        with LineProgress(print).task("steps", total=2) as task:
            gone = Gone()
            del gone
            done.append("before")
            task.advance()
            done.append("after")

    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("plan")(works)
    monkeypatch.setattr(main_module, "build", lambda load: app)
    # A shell without job control starts what runs in the background deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["plan"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["before"]
    assert "interrupted" in capsys.readouterr().err


def test_full_disk_reads_as_such(monkeypatch, capsys) -> None:
    fails_with(monkeypatch, OSError(28, "No space left on device", "/some/file"))
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == "error: no space left on device\n  at: /some/file\n"


def test_surprise_shows_no_traceback_but_says_how_to_get_one(monkeypatch, capsys) -> None:
    fails_with(monkeypatch, KeyError("x"))
    assert main(["plan"]) == 1
    err = capsys.readouterr().err
    assert "unexpected KeyError" in err
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--debug", "plan"], ["plan", "--debug"]])
def test_debug_shows_the_traceback_from_either_side(arguments, monkeypatch, capsys) -> None:
    fails_with(monkeypatch, KeyError("x"))
    assert main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


def test_version_is_that_of_the_package(monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "prunekit 1.2.3 of prunekit\n"


def test_error_is_coloured_on_a_terminal_only_and_never_with_no_color(monkeypatch, capsys) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _errors.show(UsageError("x"), as_json=False)
    assert "\x1b[" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    _errors.show(UsageError("x"), as_json=False)
    assert "\x1b[" not in capsys.readouterr().err


def test_shell_completes_verbs_and_their_options() -> None:
    words = {"COMP_WORDS": "prunekit pl", "COMP_CWORD": "1"}
    run = "import sys; from prunekit.cli.main import main; sys.exit(main([]))"
    assert python(run, _PRUNEKIT_COMPLETE="complete_bash", **words).stdout.split() == ["plan"]
    words = {"COMP_WORDS": "prunekit prune --over", "COMP_CWORD": "2"}
    assert python(run, _PRUNEKIT_COMPLETE="complete_bash", **words).stdout.split() == ["--overwrite"]


def test_loaded_and_unloaded_verbs_list_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for load in ([], verbs()):
        build(load)(args=["--help"], prog_name="prunekit", standalone_mode=False)
        texts.append(sorted(capsys.readouterr().out.split()))
    assert texts[0] == texts[1]


def test_module_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunekit.cli.main", "recipes", "check", "no-such-file.yaml"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no recipe `no-such-file.yaml`")
