"""What a configuration says of a model's shape: depth, widths, and what differs from block to block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunekit.core.errors import StructureError
from prunekit.structure.architecture import PREFIX, Architecture, Pattern, SublayerKind

# What a configuration of a heterogeneous folder calls a removed sub-layer.
SKIPS: dict[SublayerKind, str] = {"attention": "attention", "cross_attention": "cross_attention", "ffn": "mlp"}
# More than any model has; larger claims come from damaged files and would take memory in proportion.
_MOST = {"blocks": 10_000, "heads": 65_536, "kv_heads": 65_536, "experts": 65_536}
_MOST_WIDTH = 2**24
# What a block of a heterogeneous folder may say of itself in numbers.
_COUNTS = (
    "num_attention_heads",
    "num_key_value_heads",
    "cross_attention_heads",
    "intermediate_size",
    "num_local_experts",
)


def text_config(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The part of a configuration that describes the blocks.

    Raises:
        StructureError: if it is something else.
    """
    found = config.get(arch.section, config)
    if not isinstance(found, Mapping):
        raise StructureError(f"`{arch.section}` must be a mapping", why=_said(found), at="config.json")
    return {**arch.defaults.get(str(found.get("model_type")), {}), **found}


class Shape:
    """Numbers that a configuration gives: depth, widths, and what differs in a heterogeneous folder.

    Args:
        config: the whole configuration.
        arch: its architecture, or one of the stacks of that.
    Raises:
        StructureError: where a number is missing, or is none.
    """

    def __init__(self, config: Mapping[str, Any], arch: Architecture) -> None:
        self.config, self.arch = text_config(config, arch), arch
        section = config.get("prunekit") if str(config.get("model_type", "")).startswith(PREFIX) else None
        self.blocks = self._number("blocks")
        self.hidden = self._number("hidden")
        self.heads = self._number("heads")
        self.kv_heads = self._number("kv_heads", self.heads)
        built = (section or {}).get("built_hidden_size", self.hidden)
        self.head_width = self._number("head_width", built // self.heads)
        self.ffn = self._number("ffn", self._number("ffn_multiple", 4) * self.hidden)
        vocabulary = self.config.get("vocab_size")
        self.vocabulary: int = vocabulary if isinstance(vocabulary, int) and _counts(vocabulary) else 0
        self.dense_ffn = self._number("dense_ffn", self.ffn)
        self.experts = self._number("experts") if "experts" in arch.keys else 0
        self.dense = arch.dense_blocks(self.config, self.blocks) if self.experts else frozenset(range(self.blocks))
        try:
            layers = (section or {}).get("per_layer_config") or {}
            self._layers: dict[int, Mapping[str, Any]] = dict(_of_stack(layers, arch.stack))
            self.skips = {i: set(layer.get("skip", ())) for i, layer in self._layers.items()}
            if not all(_counts(layer.get(key, 1)) for layer in self._layers.values() for key in _COUNTS):
                raise ValueError
        except (AttributeError, TypeError, ValueError) as error:
            raise StructureError("`prunekit.per_layer_config` is damaged", at="config.json") from error

    def _number(self, role: str, default: int | None = None) -> int:
        key = self.arch.key(role, self.config)
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise StructureError(f"`{key}` must be a whole number above 0", why=_said(value), at="config.json")
        if value > _MOST.get(role, _MOST_WIDTH):
            raise StructureError(f"`{key}` is larger than that of any model", why=_said(value), at="config.json")
        return value

    def usual(self) -> dict[str, dict[str, int]]:
        """Widths of `attention`, `cross_attention`, `ffn` and `dense_ffn` where a block says nothing else, by axis."""
        experts = {"experts": self.experts} if self.experts else {}
        attention = {"kv": self.kv_heads, "rep": self.heads // self.kv_heads, "hd": self.head_width}
        return {
            "attention": attention,
            "cross_attention": attention,
            "ffn": {"ffn": self.ffn, **experts},
            "dense_ffn": {"ffn": self.dense_ffn},
        }

    def tensors(self, block: int, kind: SublayerKind) -> Mapping[str, Pattern]:
        """Tensors that a sub-layer of a block has, by the name after the block's number."""
        sparse = kind != "ffn" or not self.experts or block not in self.dense
        return self.arch.sublayers[kind if sparse else "dense_ffn"]

    def present(self, block: int, kind: SublayerKind) -> bool:
        """Whether a block has a sub-layer."""
        return SKIPS[kind] not in self.skips.get(block, ())

    def widths(self, block: int, kind: SublayerKind) -> dict[str, int]:
        """Widths of a sub-layer of a block by axis.

        Raises:
            StructureError: where its heads do not divide, or are not known.
        """
        layer = self._layers.get(block, {})
        if kind == "ffn" and self.experts and block not in self.dense:
            ffn, experts = layer.get("intermediate_size", self.ffn), layer.get("num_local_experts", self.experts)
            return {"ffn": ffn, "experts": experts}
        if kind == "ffn":
            return {"ffn": layer.get("intermediate_size", self.dense_ffn)}
        if kind == "cross_attention":
            heads = layer.get("cross_attention_heads", self.heads)
            return {"kv": heads, "rep": 1, "hd": self.head_width}
        heads, groups = layer.get("num_attention_heads", self.heads), layer.get("num_key_value_heads", self.kv_heads)
        if heads % groups:
            why = f"{heads} query heads in {groups} KV groups"
            raise StructureError(f"the heads of block {block} do not divide", why=why, at="config.json")
        numbers = layer.get("kept_heads", range(groups))
        if len(numbers) != groups or not set(numbers) <= set(range(self.kv_heads)):
            why = f"`kept_heads` are {numbers}, of {self.kv_heads} heads {groups} stay"
            raise StructureError(f"the heads of block {block} are not known", why=why, at="config.json")
        return {"kv": groups, "rep": heads // groups, "hd": self.head_width}


def _of_stack(layers: Mapping[str, Any], stack: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Entries of a stack's blocks by number; keys read `decoder.03`, or `03` where there is one stack."""
    for key, layer in layers.items():
        name, _, number = str(key).rpartition(".")
        if name == stack:
            yield int(number), layer


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_WIDTH


def _said(value: Any) -> str:
    return f"it is {repr(value)[:100]}"
