"""What an output folder's `prunekit.json` says, checked, for everything that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from prunekit.core.errors import UsageError
from prunekit.modeling.families import auto_class
from prunekit.report.layer_map import Row
from prunekit.report.table import MEASURES

MANIFEST = "prunekit.json"
_MAX_BYTES = 500_000_000
_SHOWN_PROBLEMS = 3

Text = Annotated[str, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]


class _Part(BaseModel):
    # Keys that a newer version added are passed over.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Source(_Part):
    """The model before the cut: name, where it came from, digests by file name, what its own card says."""

    name: Text
    kind: Text = ""
    revision: Text | None = None
    sha256: dict[str, Text] = {}
    card: dict[str, Any] = {}


class PlanPart(_Part):
    """The cuts, as `plan.Plan` writes them."""

    drop: tuple[Text, ...]
    keep: dict[str, tuple[NonNegativeInt, ...]]
    model: dict[str, Any] = {}

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """Units of each kind in every sub-layer of the source; {} where the manifest does not say."""
        listed, found = self.model.get("sublayers"), {}
        for entry in listed if isinstance(listed, list) else []:
            address, *counts = entry if isinstance(entry, list) and entry else [None]
            kinds = ("neurons",) if str(address).endswith(".ffn") else ("kv_groups", "query_heads")
            if len(counts) >= len(kinds) and all(isinstance(count, int) for count in counts):
                found[str(address)] = dict(zip(kinds, counts, strict=False))
        return found


class ScoresPart(_Part):
    """Scores of one step; higher = keep."""

    method: Text
    kind: Text
    units: tuple[Text, ...]
    values: tuple[Number | None, ...]
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _same_length(self) -> ScoresPart:
        if len(self.units) != len(self.values):
            raise ValueError("there must be one value a unit")
        return self


class StepPart(_Part):
    """One removal of a search; the distance is that of the model without all units removed so far."""

    units: tuple[Text, ...]
    distance: Number | None


class OrderPart(_Part):
    """Removal order of one step."""

    method: Text
    steps: tuple[StepPart, ...]
    provenance: dict[str, Any] = {}


class CellPart(_Part):
    """One sub-layer of the layer map; see `layer_map.Cell`."""

    state: Literal["kept", "narrowed", "removed", "absent"]
    widths: dict[str, tuple[NonNegativeInt, PositiveInt]] = {}


class RowPart(_Part):
    """One block of the layer map."""

    block: NonNegativeInt
    attention: CellPart
    ffn: CellPart
    cross_attention: CellPart = CellPart(state="absent")
    stack: Literal["", "encoder", "decoder"] = ""


class Expectation(_Part):
    """A limit of the recipe and what was measured."""

    name: Text
    limit: Any
    value: Any
    ok: bool


class Check(_Part):
    """One check of the written folder in a fresh process."""

    name: Text
    passed: bool
    detail: Text = ""


class Verified(_Part):
    """All checks of the written folder."""

    ok: bool
    checks: tuple[Check, ...] = ()


class Run(_Part):
    """A finished run of `prunekit prune`.

    What later versions added has a default, so that folders of earlier ones can be read.
    """

    version: Literal[1] = Field(alias="schema")
    versions: dict[str, Text] = {}
    source: Source
    recipe: dict[str, Any]
    plan: PlanPart
    orders: tuple[ScoresPart | OrderPart, ...] = ()
    layout: Literal["stock", "repacked", "heterogeneous"]
    loads: dict[str, Text] = {}
    before: dict[str, Any]
    after: dict[str, Any]
    cut: dict[str, Any] = {}
    exports: dict[str, dict[str, Any]] = {}
    expectations: tuple[Expectation, ...] = ()
    verified: Verified | None = None
    seconds: dict[str, Number] = {}
    layer_map: tuple[RowPart, ...]
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _numbers(self) -> Run:
        for side in ("before", "cut", "after"):
            values = getattr(self, side)
            for measure in MEASURES:
                value = values.get(measure.key)
                if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise ValueError(f"`{side}.{measure.key}` must be a number")
        return self

    @property
    def title(self) -> str:
        """The recipe's name; the source's where it has none."""
        return str(self.recipe.get("name") or self.source.name)

    @property
    def rows(self) -> list[Row]:
        """The layer map."""
        return [Row.from_json(row.model_dump()) for row in self.layer_map]

    @property
    def prompt(self) -> str:
        """What the samples continue, "" where there is none."""
        sample = part(self.recipe, "evaluate", "sample")
        return str(sample.get("prompt", ""))

    @property
    def samples(self) -> dict[str, str]:
        """Continuations by `before` and `after`, those there are."""
        sides = {"before": self.before.get("sample"), "after": self.after.get("sample")}
        return {side: str(text) for side, text in sides.items() if text}

    @property
    def onnx(self) -> bool:
        """Whether the run wrote ONNX files."""
        return bool(self.after.get("onnx_bytes"))

    def recipe_text(self) -> str:
        """The effective recipe as YAML."""
        return yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=110)


def part(data: Any, *keys: str) -> dict[str, Any]:
    """A mapping inside mappings; {} where there is none."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def read_run(folder: Path) -> Run:
    """What a run of `prunekit prune` left in its folder.

    Raises:
        UsageError: if the folder is none, or its manifest is missing, damaged or of another kind.
    """
    path = folder / MANIFEST
    hint = "give the output folder of a `prunekit prune`"
    if not folder.is_dir():
        raise UsageError(f"there is no folder `{folder}`", hint=hint)
    if not path.is_file():
        raise UsageError(f"`{folder}` holds no `{MANIFEST}`", why="a report shows what a run recorded there", hint=hint)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"`{path}` is larger than any manifest", hint=hint)
        return Run.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"`{path}` cannot be read", why=error.strerror or str(error)) from error
    except ValidationError as error:
        raise UsageError(f"`{path}` is not a manifest of a pruning run", why=_problems(error), hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{path}` is not JSON", why=" ".join(str(error).split())[:200], hint=hint) from error


def read_auto_class(folder: Path) -> str:
    """Auto class of transformers that loads a folder; `AutoModel` where its configuration names none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "AutoModel"
    names = config.get("architectures") if isinstance(config, dict) else None
    return auto_class([str(name) for name in names] if isinstance(names, list) else ())


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False)
    shown = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in found[:_SHOWN_PROBLEMS]]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
