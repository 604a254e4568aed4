"""The runtime section of a model's config: which pattern, on which layers.

In `config.json`: `"prunekit": {"runtime": {"attention": {"pattern": "power", "block_tokens": 128, "layers": [1, 2]}}}`.
Beside the pattern's options stand `layers`, `length_tokens`, the longest sequence that it was chosen for, `made_for`,
which model that was, and `fastest`, which lets prompts go to another package's kernel where that was measured faster.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunekit.core.errors import RuntimePolicyError, UsageError
from prunekit.core.pattern_options import pattern_problems
from prunekit.core.registry import PATTERNS
from prunekit.runtime.attention.patterns._engine import Pattern
from prunekit.runtime.attention.patterns._scored import Scored

# What some models hand to attention beside queries, keys and values, and no kernel here computes.
_ADDITIONS = {
    "softcap": "a cap on scores", "s_aux": "learned attention sinks", "sinks": "learned attention sinks",
    "position_bias": "a bias by position", "indices": "a choice of keys", "block_indices": "a choice of keys",
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A pattern and what it is for.

    Args:
        pattern: which keys a query reads.
        layers: the layers it is for, counted from 0; None means all of them.
        length_tokens: longest sequence it was chosen for; None means any.
        made_for: what `model_facts` said of the model it was chosen for; empty means any model.
        fastest: whether prompts may go to flash-attn-4, where it is installed and was measured faster.
    """

    pattern: Pattern | Scored
    layers: tuple[int, ...] | None = None
    length_tokens: int | None = None
    made_for: tuple[tuple[str, Any], ...] = ()
    fastest: bool = False

    def covers(self, layer: int | None) -> bool:
        """Whether the pattern is for this layer."""
        return self.layers is None or layer in self.layers

    def section(self) -> dict[str, Any]:
        """The policy as it stands in a config."""
        found = {"pattern": name_of(self.pattern), **dataclasses.asdict(self.pattern)}  # type: ignore[call-overload]
        if self.layers is not None:
            found["layers"] = list(self.layers)
        if self.length_tokens is not None:
            found["length_tokens"] = self.length_tokens
        if self.made_for:
            found["made_for"] = dict(self.made_for)
        return {**found, "fastest": True} if self.fastest else found

    def require_for(self, now: Mapping[str, Any]) -> None:
        """Fails where the policy is not for a model.

        Args:
            now: what `model_facts` says of it.

        Raises:
            RuntimePolicyError: naming what differs.
        """
        for key, then in self.made_for:
            if now.get(key) != then:
                raise RuntimePolicyError(
                    f"the pattern `{name_of(self.pattern)}` was chosen for another model",
                    why=f"`{key}` was {then} there and is {now.get(key)} here",
                    hint="choose one for this model, or take `made_for` out of the section to use it all the same",
                )
        blocks = now.get("num_hidden_layers")
        wrong = [layer for layer in self.layers or () if blocks is not None and not 0 <= layer < blocks]
        if wrong:
            raise RuntimePolicyError(
                f"`layers` of the pattern `{name_of(self.pattern)}` names layer {wrong[0]}",
                why=f"the model has {blocks}, counted from 0",
            )

    def require_length(self, n_tokens: int) -> None:
        """Fails for a sequence that is longer than the pattern was chosen for.

        Raises:
            RuntimePolicyError: naming both lengths.
        """
        if self.length_tokens is not None and n_tokens > self.length_tokens:
            raise RuntimePolicyError(
                f"a sequence of {n_tokens:,} tokens is longer than `{name_of(self.pattern)}` was chosen for",
                why=f"`length_tokens` is {self.length_tokens:,}",
                hint="shorten it, or choose the pattern for longer ones",
            )


def model_facts(config: Any) -> dict[str, Any]:
    """What tells a model from others that a pattern may have been chosen for: its type, width and number of layers."""
    text = config.get_text_config()
    facts = {name: getattr(text, name, None) for name in ("model_type", "hidden_size", "num_hidden_layers")}
    return {name: value for name, value in facts.items() if value is not None}


def names() -> tuple[str, ...]:
    """All patterns by name."""
    return PATTERNS.names()


def name_of(pattern: Pattern | Scored) -> str:
    """The name under which a pattern is found."""
    return type(pattern).__module__.rpartition(".")[2]


def refuse_additions(options: Mapping[str, Any]) -> None:
    """Fails where a model adds to its attention what a pattern would leave out.

    Args:
        options: what the model hands to its attention function, by name.

    Raises:
        RuntimePolicyError: naming the first such addition, or if attention weights are asked for.
    """
    if options.get("output_attentions"):
        raise RuntimePolicyError(
            "a pattern gives no attention weights",
            why="`output_attentions` asks for them, and no kernel writes them",
            hint='take it out, or run the model with `attn_implementation="eager"`',
        )
    for name, what in _ADDITIONS.items():
        if options.get(name) is not None:
            raise RuntimePolicyError(
                f"a pattern does not go with {what}",
                why=f"the model hands `{name}` to its attention, which would be left out",
                hint="run the model without a pattern",
            )


def policy(section: Mapping[str, Any] | str | Pattern | Scored, layers: Sequence[int] | None = None) -> Policy:
    """Policy from a config section, a pattern's name, or a pattern.

    Args:
        section: one of these.
        layers: the layers it is for, where the section does not say.

    Raises:
        UsageError: for an unknown pattern, option, or value.
    """
    if isinstance(section, str):
        section = {"pattern": section}
    if not isinstance(section, Mapping):
        if not (dataclasses.is_dataclass(section) and hasattr(section, "causal")) or isinstance(section, type):
            raise UsageError(f"`{section}` is no pattern", hint="for example Power(), 'power' or {'pattern': 'power'}")
        return Policy(section, _layers(layers))
    options = dict(section)
    name = options.pop("pattern", None)
    if not isinstance(name, str):
        raise UsageError("a runtime section names no pattern", hint=f"add `pattern:`, one of {', '.join(names())}")
    listed, length, made_for = (options.pop(key, None) for key in ("layers", "length_tokens", "made_for"))
    fastest = options.pop("fastest", False)
    if not isinstance(fastest, bool):
        raise UsageError(f"`fastest: {fastest}` is neither true nor false")
    if problems := pattern_problems(name, options):
        raise UsageError(problems[0].what, why=problems[0].why, hint=problems[0].hint)
    if listed is not None and layers is not None:
        raise UsageError("`layers` is given twice", why="in the section and beside it")
    if length is not None and (type(length) is not int or length < 1):
        raise UsageError(f"`length_tokens: {length}` is no length", why="it is a whole number of at least 1")
    if made_for is not None and not isinstance(made_for, Mapping):
        raise UsageError(f"`made_for: {made_for}` is no mapping", hint="take it out")
    listed = _layers(layers if listed is None else listed)
    return Policy(PATTERNS.get(name)(**options), listed, length, tuple(sorted((made_for or {}).items())), fastest)


def _layers(given: object) -> tuple[int, ...] | None:
    """Numbers of layers as given.

    Raises:
        UsageError: for anything but a list of whole numbers.
    """
    if given is None:
        return None
    if not isinstance(given, list | tuple | range) or any(type(n) is not int for n in given):
        raise UsageError(f"`layers: {given}` is no list of layers", hint="for example layers=[2, 3]")
    return tuple(given)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Policy:
    return policy(json.loads(text))


# Every policy that a configuration named in this process. A compiled layer holds the number of its policy: dynamo
# traces methods of what a list holds, not those of a constant.
_POLICIES: list[Policy] = []


def policy_number(config: Any) -> int:
    """The number of the policy of a model's config, which `policy_at` takes; it holds for this process.

    Raises:
        RuntimePolicyError: if the config has none, or one for another model.
    """
    section = section_of(getattr(config, "prunekit", None))
    if section is None:
        raise RuntimePolicyError(
            '`attn_implementation="prunekit"` finds no pattern in the config of this model',
            hint="set `config.prunekit` to a runtime section, or use prunekit.runtime.attach(model, pattern=...)",
        )
    return _number(section, model_facts(config))


def policy_at(number: int) -> Policy:
    """The policy with a number."""
    return _POLICIES[number]


def policy_of(config: Any) -> Policy:
    """The policy of a model's config; errors as in `policy_number`."""
    return policy_at(policy_number(config))


# Dynamo guards what a compiled model passes here, so another section is compiled anew.
@torch.compiler.assume_constant_result
def _number(section: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
    """Place of a section's policy in `_POLICIES`."""
    found = _parsed(json.dumps(section, sort_keys=True))
    found.require_for(facts)
    if found not in _POLICIES:
        _POLICIES.append(found)
    return _POLICIES.index(found)


def section_of(prunekit: Any) -> Mapping[str, Any] | None:
    """The attention section in the `prunekit` section of a configuration; None where there is none."""
    for key in ("runtime", "attention"):
        prunekit = prunekit.get(key) if isinstance(prunekit, Mapping) else None
    return prunekit if isinstance(prunekit, Mapping) else None
