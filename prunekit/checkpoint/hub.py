"""Models of the Hugging Face hub, as far as they are safetensors and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunekit.checkpoint.pickles import require_safetensors
from prunekit.core.errors import CheckpointError
from prunekit.core.progress import NULL_PROGRESS, Progress

_INDEX = "model.safetensors.index.json"
# Everything small that belongs to a model; patterns with `*` also match in sub-folders, which hold other formats.
_TEXT = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "*.tiktoken"]
_OTHER = ["*/*"]


def downloaded(hub_id: str, revision: str | None, progress: Progress = NULL_PROGRESS) -> tuple[Path, str]:
    """Folder and commit of a hub model in the hub's own cache, which is read where there is no network.

    Only the shards that the index names are fetched: repositories often hold the weights twice.

    Raises:
        CheckpointError: if the hub has no such model or revision, it is not open to this account, or there is neither
            network nor cached copy.
    """
    with progress.task(f"downloading {hub_id}", unit="files") as task:
        folder = _snapshot(hub_id, revision, _TEXT)
        task.advance(1)
        # The commit of the first answer, so that a push in between cannot mix two versions.
        folder = _snapshot(hub_id, folder.name, [*_TEXT, *_weights(folder)])
    if not any(folder.glob("*.safetensors")):
        require_safetensors(folder, elsewhere=_names(hub_id, folder.name))
    return folder, folder.name


def _weights(folder: Path) -> list[str]:
    index = folder / _INDEX
    if not index.is_file():
        return ["model.safetensors"]
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(name) for name in found.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{_INDEX}` is damaged", why="it maps no tensors to files", at=str(index)) from error


def _names(hub_id: str, commit: str) -> list[str]:
    """All files of a hub model, downloaded or not."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(hub_id, revision=commit)
    except Exception as error:
        raise _refusal(hub_id, commit, error) from error


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": _OTHER, "tqdm_class": _silent()}
    try:
        return Path(snapshot_download(hub_id, revision=revision, **options))
    # Which classes come through depends on the version of the hub's client and of the HTTP library below it.
    except Exception as error:
        raise _refusal(hub_id, revision, error) from error


def _silent() -> type:
    """The hub's progress bar, without its output: the bar is ours."""
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _refusal(hub_id: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    version = f" at revision `{revision}`" if revision else ""
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"the hub model `{hub_id}` is not open to you",
            why="its owner grants access by request",
            hint=f"ask for access on huggingface.co/{hub_id}, then `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"no model `{hub_id}`",
            why="there is no such folder and no such model on the hub",
            hint="check the spelling; a private model needs `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        hint = f"huggingface.co/{hub_id}/commits/main lists them"
        return CheckpointError(f"the hub model `{hub_id}` has no revision `{revision}`", hint=hint)
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        command = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
        return CheckpointError(
            f"cannot get `{hub_id}`{version}",
            why="there is no such folder, and the hub cannot be reached and left no complete copy in its cache",
            hint=f"with a network: `{command}`; or give a folder",
        )
    text = " ".join(str(error).split())[:200]
    return CheckpointError(f"cannot get `{hub_id}`{version}", why=text or type(error).__name__)
