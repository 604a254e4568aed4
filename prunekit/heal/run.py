"""One healing from start to end: data, objective, training, weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import is_first_rank, place
from prunekit.core.registry import ATTENTIONS, HEALS
from prunekit.heal.scene import Scene

if TYPE_CHECKING:
    from prunekit.core.recipe_heal import Heal, Training


@dataclass(frozen=True)
class Healed:
    """A healed model.

    Args:
        model: in memory, float32 with the values that its files hold, in eval mode.
        checkpoint: the cut model's files.
        names: parameter for each tensor.
        about: what the healing says about itself.
    """

    model: Any
    checkpoint: Checkpoint
    names: Mapping[str, str]
    about: Mapping[str, Any]

    def write(self, folder: Path, max_shard_bytes: int, progress: Progress = NULL_PROGRESS) -> int:
        """Writes the weight files into a folder without any; returns how many tensors changed."""
        from prunekit.heal._weights import write_changed

        return write_changed(self.checkpoint, self.model, self.names, folder, max_shard_bytes, progress)


def check(asked: Heal, decoder: bool) -> None:
    """Everything that would end a healing later and can be known before any model is loaded.

    Args:
        asked: the recipe's `heal`.
        decoder: whether the model writes text; else it is a text encoder.
    Raises:
        UsageError: if the method does not fit the model, or a text is missing or empty.
        HealError: if peft is needed and missing.
    """
    from prunekit.heal._lora import require_peft

    HEALS.get(asked.method)(**asked.knobs).check(decoder)
    if asked.knobs.get("relations") and (asked.attention is not None or asked.compile):
        other = "attention" if asked.attention is not None else "compile"
        why = "what the model's own attention reads is watched"
        raise UsageError(f"`heal.relations` does not go with `heal.{other}`", why=why, hint="take one of them out")
    if asked.attention is not None:
        if not decoder:
            raise UsageError("`heal.attention` needs a model that writes text", why="its patterns are causal")
        ATTENTIONS.get(asked.attention.method)(**asked.attention.knobs).check(asked.length_tokens)
    if asked.train == "lora":
        require_peft()
    check_texts(asked, decoder)


def check_texts(asked: Training, decoder: bool) -> None:
    """Fails where a text that a training asks for is missing or empty, or nobody could write it.

    Raises:
        UsageError: naming it.
    """
    from prunekit.calibrate.texts import load_text
    from prunekit.heal._data import TEACHER

    for text in asked.data:
        if text.data == TEACHER and not decoder:
            raise UsageError("`data: teacher` needs a teacher that writes text", why="this one is an encoder")
        for name in (text.data, text.prompts):
            if name not in (None, TEACHER):
                load_text(str(name))


def heal(scene: Scene, work: Path) -> Healed:
    """Trains the cut model.

    Args:
        scene: what is healed, by what, how.
        work: folder for checkpoints. A killed run goes on from there; it is the caller's to delete.
    Returns:
        Of several processes the first one's holds the whole model.
    Raises:
        HealError: where training cannot go on.
        UsageError: where the data or the method does not fit the model.
    """
    from prunekit.heal import _lora, _shards
    from prunekit.heal._attention import Switch, attending
    from prunekit.heal._checkpoints import working
    from prunekit.heal._compile import compiled
    from prunekit.heal._data import gather
    from prunekit.heal._loop import Course, train
    from prunekit.heal._weights import names_of, round_as_stored
    from prunekit.modeling.load import load_model
    from prunekit.modeling.quiet import quiet

    asked, course = cast("Heal", scene.asked), Course()
    checkpoint = Checkpoint.open(scene.student)

    def load(device: str) -> Any:
        return load_model(scene.student, "float32", device, scene.trust_remote_code)

    # FSDP takes each process's part from the CPU.
    model = load("cpu" if _shards.wanted() else place(scene.device))
    names = names_of(model, checkpoint)
    data = gather(scene)
    method = HEALS.get(asked.method)(**asked.knobs)
    objective = method.objective(scene, data.inputs)
    settings = {**asked.model_dump(mode="json"), **asdict(method)}
    minutes = settings.pop("minutes", None)
    teacher = scene.teacher_digest if "teacher" in method.needs else None
    digests = {"cut_digest": scene.student_digest, "teacher_digest": teacher, "data_digest": data.digest}
    with working(work, {**settings, **digests}), quiet(), ExitStack() as stack:
        trained = _lora.adapted(model, asked) if asked.train == "lora" else model
        for each in (model, objective.teacher) if asked.compile else ():
            if each is not None:
                stack.enter_context(compiled(each))
        if asked.attention is not None:
            switch = Switch(asked)
            stack.enter_context(attending(model, switch))
            course = Course(at_step=switch.at_step)
        stack.enter_context(objective.listening(model))
        told, state = train(trained, objective, data, scene, work, course)
    if told.get("held_out_after", 0.0) > told.get("held_out_before", 0.0):
        scene.talk("the held-out loss is worse than before training: a lower `heal.lr` or more steps may help")
    if state is not None and is_first_rank():
        with _shards.whole():
            model = load("cpu")
        trained = _lora.adapted(model, asked) if asked.train == "lora" else model
        _shards.load(trained, state)
    if state is None or is_first_rank():
        model = _lora.merged(trained) if asked.train == "lora" else model
        round_as_stored(model, checkpoint, names)
    length = next(iter(data.inputs.values())).shape[1]
    about = {
        **settings,
        "minutes": minutes,
        **told,
        "tokens": told["steps_done"] * asked.batch * length,
        "trained_sequences": len(data.train),
        "held_out_sequences": len(data.held_out),
        "sequences_of": list(data.shares),
    }
    return Healed(model.eval(), checkpoint, names, about)
