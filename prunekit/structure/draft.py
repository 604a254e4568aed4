"""A first architecture file for a model that nobody has described, guessed from names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.checkpoint.reader import Checkpoint

_KEYS = {
    "blocks": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    "head_width": ("head_dim",),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"),
}
_EXPERT_KEYS = {
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "active_experts": ("num_experts_per_tok", "top_k"),
}
_NORM = re.compile(r"norm|(?:^|\.)ln_?\w*\.", re.IGNORECASE)
_HEAD_NORM = re.compile(r"(?:^|[._])[qk]_?(?:norm|layernorm|ln)")
_ATTENTION = re.compile(r"att|qkv|query|(?:^|\.)[qkvo]_|_[qkvo]\.|out_proj")
_KEY_OR_VALUE = re.compile(r"(?:^|[._])(?:k|v|key|value)(?:_proj|_lin)?\.")
_OUTPUT = re.compile(
    r"(?:^|[._])(?:o|out|c|wo)_proj\.|output|(?:^|\.)dense\.|(?:^|\.)proj\.|dense_4h|fc2|fc_out|down|w2"
)
_FUSED = re.compile(r"part|half|\+")
_LAST_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_HEADER = """\
# Draft for `{model_type}`, guessed from names and shapes. Lines marked `{mark}` are guesses that names and shapes
# do not settle; the others follow from them, and are to be checked as well.
"""
MARK = "# unsure"


def draft(checkpoint: Checkpoint) -> str:
    """YAML in the form of the files of `archs/`, unsure lines marked.

    Args:
        checkpoint: of an architecture without a file; its headers and its configuration are all that is read.
    """
    return "".join(f"{line}\n" for line in _lines(_Guess(checkpoint)))


def _lines(guess: _Guess) -> Iterator[str]:
    config = guess.config
    named = " ".join(config.get("architectures") or ())
    yield from _HEADER.format(model_type=guess.model_type, mark=MARK.removeprefix("# ")).splitlines()
    yield f"model_types: [{guess.model_type}]"
    yield f"norm: {'post' if not guess.decoder(named) else 'pre'}  {MARK}"
    yield f"decoder: {str(guess.decoder(named)).lower()}"
    yield "keys:"
    for role, key in guess.keys.items():
        yield f"  {role}: {key}" if key in config else f"  {role}: {key}  {MARK}"
    depth = guess.numbers.get("blocks", 0)
    lists = [key for key, value in config.items() if isinstance(value, list) and len(value) == depth > 1]
    lists = [key for key in lists if key not in ("architectures", "eos_token_id")]
    yield f"lists: {{{', '.join(f'{key}: attention' for key in lists)}}}" + (f"  {MARK}" if lists else "")
    widths = ["query_heads", "kv_groups"] if "head_width" in guess.keys and "kv_heads" in guess.keys else []
    yield f"stock_widths: [{', '.join([*widths, 'neurons'])}]  {MARK}"
    yield f"block: '{guess.block}'"
    for kind in ("attention", "ffn"):
        yield f"{kind}:"
        for name in guess.order(kind):
            layout, sure = guess.layout(name)
            optional = "" if guess.counts[name] == guess.most else "?"
            yield f"  {name}{optional}: [{', '.join(layout)}]" + ("" if sure else f"  {MARK}")
    yield "outer:"
    yield from guess.outer()


class _Guess:
    """What names, shapes and configuration suggest."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = _section(checkpoint.config)
        self.model_type = str(checkpoint.config.get("model_type", "unknown"))
        self.shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        self.prefix = _block_prefix(self.shapes)
        found = {name: self._inside(name) for name in self.shapes}
        self.inner: dict[str, tuple[int, ...]] = {}
        self.counts: Counter[str] = Counter()
        for name, rest in found.items():
            if rest is not None:
                self.inner.setdefault(rest, self.shapes[name])
                self.counts[rest] += 0 if re.search(r"\.experts\.(?!0\.)\d+\.", name) else 1
        # Linear layers store [out, in]; the length of a bias gives away those that store [in, out].
        weights = {name: self.inner.get(f"{name.removesuffix('.bias')}.weight", ()) for name in self.inner}
        biased = [(self.inner[name], shape) for name, shape in weights.items() if name.endswith(".bias")]
        self.transposed = any(len(shape) == 2 and shape[0] != bias[0] == shape[1] for bias, shape in biased)
        self.most = max(self.counts.values(), default=0)
        self.outside = [name for name, rest in found.items() if rest is None]
        roles = _KEYS | (_EXPERT_KEYS if any("{expert}" in name for name in self.inner) else {})
        present = {role: [key for key in names if key in self.config] for role, names in roles.items()}
        self.keys = {role: (keys or [roles[role][0]])[0] for role, keys in present.items() if keys or role in _NEEDED}
        self.numbers = {role: self.config[key] for role, key in self.keys.items() if _is_count(self.config.get(key))}

    def decoder(self, named: str) -> bool:
        """Whether the model writes text."""
        return bool(re.search(r"ForCausalLM|LMHead|ForConditionalGeneration", named)) or "kv_heads" in self.keys

    @property
    def block(self) -> str:
        """Pattern of names up to a block's number; what comes before the last part may be missing."""
        *first, last = self.prefix.removesuffix(".").split(".")
        return (f"(?:{re.escape('.'.join(first))}\\.)?" if first else "") + f"{re.escape(last)}\\."

    def order(self, kind: str) -> list[str]:
        """Names of a sub-layer's tensors, norms first."""
        mine = [name for name in self.inner if self._kind(name)[0] == kind]
        return sorted(mine, key=lambda name: not _NORM.search(name))

    def layout(self, name: str) -> tuple[list[str], bool]:
        """Axes of each dimension, and whether names and shapes settle them."""
        shape, (kind, placed) = self.inner[name], self._kind(name)
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and len(self.inner.get(weight, ())) == 2:
            dims, sure = self.layout(weight)
            return [dims[-1 if self.transposed else 0]], sure
        options = [self._options(size, kind, name) for size in shape]
        if len(shape) == 2 and all("hidden" in found and len(found) > 1 for found in options):
            inner = next(axis for axis in options[0] if axis != "hidden")
            return ([inner, "hidden"] if bool(_OUTPUT.search(name)) == self.transposed else ["hidden", inner]), True
        if len(shape) == 1 and _NORM.search(name) and "hidden" in options[0]:
            own = _HEAD_NORM.search(name) and options[0][0]
            return [own or "hidden"], placed and not own
        if len(shape) == 2 and any(found and "hidden" not in found for found in options):
            options = [["hidden"] if "hidden" in found else found for found in options]
        dims = [found[0] if found else _unknown(size) for found, size in zip(options, shape, strict=True)]
        if len(dims) == 2 and dims[0] == dims[1] == "hidden":
            return dims, False
        # How queries, keys and values lie in one matrix is the model's own affair.
        fused = any(_FUSED.search(dim) for dim in dims)
        return dims, placed and not fused and all(len(found) == 1 for found in options)

    def outer(self) -> Iterator[str]:
        """Lines for tensors outside blocks, and the names of head and table."""
        hidden, vocab = self.numbers.get("hidden"), self.config.get("vocab_size")
        head = table = ""
        lines: dict[str, str] = {}
        for name in self.outside:
            shape = self.shapes[name]
            pattern = re.escape(name).replace("\\_", "_")
            first = self.prefix.split(".")[0] + "."
            if name.startswith(first) and first != self.prefix:
                pattern = f"(?:{re.escape(first)})?{re.escape(name.removeprefix(first))}"
            if shape == (vocab, hidden):
                lines[pattern] = "[vocab, hidden]"
                head, table = (pattern, table) if "head" in name or "out" in name else (head, pattern)
            elif shape == (hidden,) and name.count(".") <= 2:
                lines[pattern] = "[hidden]"
            else:
                lines[re.escape(".".join(name.split(".")[:2])) + "\\..*" if name.count(".") > 2 else pattern] = "any"
        yield from (f"  '{pattern}': {layout}" for pattern, layout in lines.items())
        yield from (f"{key}: '{value}'" for key, value in (("head", head), ("table", table)) if value)

    def _inside(self, name: str) -> str | None:
        """A block tensor's name behind the block's number, `{expert}` for an expert's number; None outside blocks."""
        found = re.fullmatch(rf"{re.escape(self.prefix)}\d+\.(.+)", name) if self.prefix else None
        return _LAST_NUMBER.sub("{expert}", found[1]) if found else None

    def _kind(self, name: str) -> tuple[str, bool]:
        """Sub-layer of a tensor, and whether its name settles that."""
        if _NORM.search(name) and not _HEAD_NORM.search(name) and "." not in name.rpartition(".")[0]:
            return self._norm_kind(name), bool(re.search(r"input_layernorm|ln_1|self_attn|before", name))
        attention = bool(_ATTENTION.search(name.partition(".")[0])) or (
            bool(_ATTENTION.search(name)) and not re.search(r"mlp|ffn|feed_forward|experts|moe", name)
        )
        return ("attention" if attention else "ffn"), True

    def _norm_kind(self, name: str) -> str:
        if re.search(r"post_attention", name):
            before = any(re.search(r"pre_(?:feedforward|mlp|ffn)|post_feedforward", other) for other in self.inner)
            return "attention" if before else "ffn"
        return "attention" if re.search(r"att|input|before|ln_1|ln1|norm1", name) else "ffn"

    def _options(self, size: int, kind: str, name: str) -> list[str]:
        """Axes that a dimension of a size can factor into, likeliest first."""
        hidden, heads = self.numbers.get("hidden", 0), self.numbers.get("heads", 1)
        kv = self.numbers.get("kv_heads", heads)
        width = self.numbers.get("head_width", hidden // heads)
        ffn = self.numbers.get("ffn", 4 * hidden)
        queries, keys = heads * width, kv * width
        found: dict[str, int] = {}
        if kind == "attention":
            if _KEY_OR_VALUE.search(name):
                found["kv hd"] = keys
            elif "norm" in name:
                found["hd"] = width
            found |= {"kv rep hd": queries} if not found or "hd" in found else {}
            fused = "kv rep hd + kv hd + kv hd"
            found |= {"part kv rep hd" if keys == queries else fused: queries + 2 * keys}
        else:
            found = {"ffn": ffn, "half ffn": 2 * ffn, "experts": self.numbers.get("experts", 0)}
        return [axis for axis, length in {**found, "hidden": hidden}.items() if length == size]


_NEEDED = ("blocks", "hidden", "heads", "ffn")


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the blocks: a language model's own, where there is one inside."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and not any(key in config for key in _KEYS["blocks"]) else config


def _block_prefix(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What names of block tensors begin with, up to the number: that under which most tensors lie."""
    found = Counter(match[1] for name in shapes if (match := re.match(r"(.*?\.?)\d+\.", name)) and match[1])
    return found.most_common(1)[0][0] if found else ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _unknown(size: int) -> str:
    return f"d{size}"
