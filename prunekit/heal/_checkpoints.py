"""Training checkpoints in the work folder: sealed by digests when whole, checked before training goes on from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit.core.errors import HealError
from prunekit.core.files import sha256_file, write_json
from prunekit.core.ranks import is_first_rank

RUN, _SEAL, _END, _STATE = "run.json", "sealed.json", "ended.json", "trainer_state.json"


@contextmanager
def working(work: Path, facts: dict[str, Any]) -> Iterator[None]:
    """The work folder while a training lasts; it goes where the training fails before its first checkpoint.

    Args:
        work: the folder.
        facts: what the training is made of, plain values.
    Raises:
        HealError: if another training, or something else, lies there.
    """
    if is_first_rank():
        _open_work(work, facts)
    try:
        yield
    except BaseException:
        if is_first_rank() and not sealed(work):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _open_work(work: Path, facts: dict[str, Any]) -> None:
    """Makes the work folder, or makes sure that what lies in it is the same training."""
    if not work.exists():
        work.mkdir(parents=True)
        write_json(work / RUN, facts)
        return
    try:
        found = json.loads((work / RUN).read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise HealError(
            f"`{work}` is no training that can go on", why=f"it has no readable `{RUN}`", hint="delete or rename it"
        )
    odd = [name for name in {**found, **facts} if found.get(name) != facts.get(name)]
    if odd and not sealed(work):
        # Nothing was reached yet that could be lost.
        write_json(work / RUN, facts)
    elif odd:
        told = [f"`{name}` was {found.get(name)}, is {facts.get(name)}" for name in odd if "digest" not in name]
        raise HealError(
            f"`{work}` holds an unfinished training of another kind",
            why="; ".join(told) or f"{', '.join(odd).replace('_', ' ')} differs",
            hint="give the same settings to go on with it, or delete or rename the folder",
        )


def seal(checkpoint: Path, stopped_by: str | None) -> None:
    """Marks a checkpoint as whole.

    Args:
        checkpoint: its folder.
        stopped_by: why training ends here; None where it goes on.
    """
    if stopped_by is not None:
        write_json(checkpoint / _END, {"stopped_by": stopped_by})
    found = sorted(file.relative_to(checkpoint) for file in checkpoint.rglob("*") if file.is_file())
    files = {name.as_posix(): sha256_file(checkpoint / name) for name in found if name.name != _SEAL}
    write_json(checkpoint / _SEAL, files)


def sealed(work: Path) -> list[Path]:
    """Whole checkpoints of a work folder, oldest first."""
    found = [path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted((path for path in found if (path / _SEAL).is_file()), key=_step)


def latest(work: Path) -> Path | None:
    """The checkpoint to go on from, None where there is none; the unfinished ones of a killed run are ignored.

    Raises:
        HealError: if its files, or those of the best one so far, are not those that were sealed.
    """
    whole = sealed(work)
    if not whole:
        return None
    checkpoint = whole[-1]
    instead = f"its folder, to go on from `{whole[-2].name}`" if len(whole) > 1 else f"`{work}`, to begin again"
    _require_whole(checkpoint, f"delete {instead}")
    best = best_of(checkpoint)
    if best is not None and best != checkpoint:
        _require_whole(best, f"it is the best one so far; delete `{work}`, to begin again")
    return checkpoint


def best_of(checkpoint: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss when this one was written; None where nothing is held out."""
    step = json.loads((checkpoint / _STATE).read_text("utf-8")).get("best_global_step")
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def ended_by(checkpoint: Path | None) -> str | None:
    """Why training ended with a whole checkpoint; None where it goes on."""
    if checkpoint is None or not (checkpoint / _END).is_file():
        return None
    return str(json.loads((checkpoint / _END).read_text("utf-8"))["stopped_by"])


def _require_whole(checkpoint: Path, hint: str) -> None:
    try:
        digests = json.loads((checkpoint / _SEAL).read_text("utf-8"))
        bad = [n for n, digest in digests.items() if _outside(n) or sha256_file(checkpoint / n) != digest]
    except (OSError, ValueError, AttributeError) as error:
        bad = [str(error)]
    if bad:
        why = f"not as written: {bad[0]}"
        raise HealError(f"the training checkpoint `{checkpoint}` is damaged", why=why, hint=hint)


def _outside(name: str) -> bool:
    return Path(name).is_absolute() or ".." in Path(name).parts


def drop_unfinished(work: Path) -> None:
    """Deletes checkpoints that a killed run did not finish."""
    whole = sealed(work)
    for path in work.glob("checkpoint-*"):
        if path not in whole:
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
