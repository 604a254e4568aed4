"""The formats besides safetensors, by the names of `prunekit export --format` and of a recipe's `export.formats`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunekit.core.errors import ExportError
from prunekit.core.progress import Progress

if TYPE_CHECKING:
    from prunekit.export.gguf import GgufType
    from prunekit.export.masked import Cut
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView


class Report(Protocol):
    """What an export says about itself."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""


@dataclass(frozen=True)
class Options:
    """What some formats can be told.

    Args:
        gguf_type: of matrices in a GGUF file.
        source: dense model of a masked copy; the manifest's if None.
        cut: the same from a run that has both in hand.
        max_shard_bytes: largest safetensors file.
    """

    gguf_type: GgufType = "auto"
    source: str | None = None
    cut: Cut | None = None
    max_shard_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class Target:
    """A format.

    Args:
        require: fails where a model cannot be written so, before any work; without a plan it looks at the packages and
            the model alone.
        write: writes a checkpoint folder into an empty one.
    """

    require: Callable[[ModelView, Plan | None], None]
    write: Callable[[Path, Path, Options, Progress], Report]


def _require_onnx(view: ModelView, plan: Plan | None) -> None:
    from prunekit.export.onnx import require_packages

    if view.arch.stacks:
        why = "models with an encoder and a decoder are not exported"
        raise ExportError(f"`{view.model_type}` cannot be written as ONNX", why=why)
    require_packages()


def _write_onnx(folder: Path, out: Path, options: Options, progress: Progress) -> Report:
    from prunekit.export import onnx

    return onnx.export_onnx(folder, out, progress)


def _require_gguf(view: ModelView, plan: Plan | None) -> None:
    from prunekit.export.gguf import require_gguf
    from prunekit.plan.gguf_rules import gguf_layout, require_family

    require_family(view)
    require_gguf(view)
    if plan is not None:
        gguf_layout(view, plan)


def _write_gguf(folder: Path, out: Path, options: Options, progress: Progress) -> Report:
    from prunekit.export.gguf import export_gguf

    return export_gguf(folder, out, progress, type=options.gguf_type)


def _require_deci(view: ModelView, plan: Plan | None) -> None:
    from prunekit.export.decilm import decilm_entries

    decilm_entries(view, plan)


def _write_deci(folder: Path, out: Path, options: Options, progress: Progress) -> Report:
    from prunekit.export.decilm import export_decilm

    return export_decilm(folder, out, progress, max_shard_bytes=options.max_shard_bytes)


def _require_genai(view: ModelView, plan: Plan | None) -> None:
    from prunekit.export.genai import require_decoder

    _require_onnx(view, plan)
    require_decoder(view, plan)


def _write_genai(folder: Path, out: Path, options: Options, progress: Progress) -> Report:
    from prunekit.export.genai import export_genai

    return export_genai(folder, out, progress)


def _require_masked(view: ModelView, plan: Plan | None) -> None:
    from prunekit.export.masked import require_maskable

    require_maskable(view, plan)


def _write_masked(folder: Path, out: Path, options: Options, progress: Progress) -> Report:
    from prunekit.export.masked import export_masked, open_cut

    cut = options.cut or open_cut(folder, options.source, progress)
    return export_masked(cut, out, progress, max_shard_bytes=options.max_shard_bytes)


TARGETS = {
    "onnx": Target(_require_onnx, _write_onnx),
    "gguf": Target(_require_gguf, _write_gguf),
    "deci": Target(_require_deci, _write_deci),
    "genai": Target(_require_genai, _write_genai),
    "masked": Target(_require_masked, _write_masked),
}
