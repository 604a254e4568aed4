"""What every task promises, and what the generative ones ask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from prunekit.core.errors import UsageError
from prunekit.core.registry import TASKS
from prunekit.evaluate.probe import linear_probe, nearest_neighbours
from prunekit.evaluate.specs import SUITES, parse_task, suite
from prunekit.evaluate.subject import KINDS
from prunekit.evaluate.tasks._canary import begins_with
from prunekit.evaluate.tasks.repetition import repeated

GENERATIVE = ("arithmetic", "brackets", "copying", "counting", "lists")


@pytest.mark.parametrize("name", TASKS.names())
def test_task_says_what_it_is_for(name: str) -> None:
    cls = TASKS.get(name)
    assert set(cls.reads) <= set(KINDS)
    assert set(cls.backends) <= {"torch", "onnx"}
    assert "torch" in cls.backends
    assert not cls.limits or cls.limits in cls.__pydantic_fields__
    assert isinstance(cls.machine_bound, bool)
    assert cls.version >= 1
    # What a recipe writes beside the options.
    assert not {"task", "name"} & set(cls.__pydantic_fields__)


@pytest.mark.parametrize("kind", ["text", "sentences", "images"])
@pytest.mark.parametrize("name", SUITES)
def test_suites_hold_tasks_of_their_kind_under_different_names(name: str, kind: str) -> None:
    tasks = suite(name, kind, None)  # type: ignore[arg-type]
    assert all(kind in made.task.reads for made in tasks)
    assert len({made.label for made in tasks}) == len(tasks)


def test_no_suite_is_for_models_with_an_encoder_and_a_decoder() -> None:
    with pytest.raises(UsageError, match="the suite `quick` has no task for a model with an encoder and a decoder"):
        suite("quick", "seq2seq", None)


def test_suite_fits_short_models() -> None:
    tasks = {made.name: made.task for made in suite("quick", "text", 300)}
    assert tasks["passkey"].lengths == (256,)  # type: ignore[attr-defined]
    short = {made.name: made.task for made in suite("quick", "text", 64)}
    assert "passkey" not in short
    assert short["perplexity"].length_tokens == 64  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", GENERATIVE)
def test_questions_belong_to_their_seed(name: str) -> None:
    first = parse_task(f"{name},limit=30").task.load()
    assert first == parse_task(f"{name},limit=30").task.load()
    assert first[:5] == parse_task(f"{name},limit=5").task.load()
    assert first != parse_task(f"{name},limit=30,seed=1").task.load()
    assert len(set(first)) > 20


def test_answers_are_right() -> None:
    for prompt, answer in parse_task("arithmetic").task.load():
        for line in f"{prompt} {answer}".splitlines():
            left, right = line.split(" = ")
            a, sign, b = left.split()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert int(right) >= 0
    for prompt, answer in parse_task("counting").task.load():
        numbers = [int(part) for part in f"{prompt} {answer}".split(",")]
        assert numbers == list(range(numbers[0], numbers[0] + 12))
    for prompt, answer in parse_task("copying,words=5").task.load():
        assert prompt.endswith(f"Line: {answer}\nCopy:")
        assert len(answer.split()) == 5
    for prompt, answer in parse_task("lists").task.load():
        assert prompt == f"{answer}; {answer};"
    pairs = dict(zip("([{<", ")]}>", strict=True))
    for prompt, answer in parse_task("brackets,depth=3").task.load():
        opened = prompt.splitlines()[-2].removeprefix("Open: ").split()
        assert answer.split() == [pairs[sign] for sign in reversed(opened)]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" 12\n3", "12", True),
        ("123", "12", False),
        ("12, 13", "12", True),
        ("1", "12", False),
        ("", "12", False),
        (") ] and", ") ]", True),
        (") ])", ") ]", True),
    ],
)
def test_answer_must_end_where_it_ends(text: str, answer: str, right: bool) -> None:
    assert begins_with(text, answer) is right


def test_repeated_share() -> None:
    assert repeated([1, 2, 1, 2, 1, 2], 2) == pytest.approx(0.6)
    assert repeated(list(range(9)), 2) == 0.0
    assert repeated([1], 2) == 0.0


def test_probe_stands_where_its_loss_is_flat() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (90,), generator=draw)
    centres = torch.randn(3, 5, generator=draw, dtype=torch.float64)
    features = centres[labels] + 0.7 * torch.randn(90, 5, generator=draw, dtype=torch.float64)
    guesses = linear_probe(features, labels, features, 3)

    # A second way to the same optimum: Newton's method on the same loss.
    def loss(flat: torch.Tensor) -> torch.Tensor:
        weight, bias = flat[:15].view(3, 5), flat[15:]
        return cross_entropy(features @ weight.T + bias, labels, reduction="sum") + 0.5 * (weight**2).sum()

    flat = torch.zeros(18, dtype=torch.float64)
    for _ in range(20):
        # The three biases may move together without changing anything; the tiny ridge fixes that.
        curve = torch.func.hessian(loss)(flat) + 1e-9 * torch.eye(18, dtype=torch.float64)
        flat = flat - torch.linalg.solve(curve, torch.func.grad(loss)(flat))
    assert float(torch.func.grad(loss)(flat).abs().max()) < 1e-6
    weight, bias = flat[:15].view(3, 5), flat[15:]
    expected = (features @ weight.T + bias).argmax(-1)
    assert torch.equal(guesses, expected)
    assert not torch.equal(guesses, labels)


def test_nearest_neighbours_vote() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]], dtype=torch.float64)
    labels = torch.tensor([1, 1, 0, 0, 0])
    dev = torch.tensor([[5.0, 0.1], [0.0, 9.0]], dtype=torch.float64)
    assert nearest_neighbours(train, labels, dev, 2, k=3).tolist() == [1, 0]
    assert nearest_neighbours(train, labels, dev, 2, k=50).tolist() == [0, 0]
