"""A tokenizer's vocabulary from its `tokenizer.json`: what each token is built from, and the files without some tokens.

Kept tokens go on being made the way they were. A byte-level or character BPE builds a token from others by merges, so a
token that stays keeps all that its own merges pass through; text whose tokens all stay then meets the same merges in
the same order. WordPiece takes the longest piece that fits, which no missing shorter one changes. Single characters and
bytes always stay, so that text whose tokens are gone is written with shorter ones and still reads back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunekit.core.errors import CheckpointError
from prunekit.core.files import write_json, write_text

FILE = "tokenizer.json"
# Vocabularies in forms that are not rewritten; a reader that found one would give other ids.
STALE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Vocabulary:
    """The content of a `tokenizer.json`.

    Args:
        folder: where it lies, with the other files of the tokenizer.
        data: parsed.
    """

    folder: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Vocabulary:
        """The vocabulary of a model folder.

        Raises:
            CheckpointError: if there is none, it is damaged, or it is of a kind that cannot lose tokens here.
        """
        try:
            data = json.loads((folder / FILE).read_text("utf-8"))
            model = data["model"]
            kind = model.get("type") or ("BPE" if "merges" in model else "")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"`{folder}` has no readable `{FILE}`", why=" ".join(str(error).split())) from error
        affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
        if kind not in ("BPE", "WordPiece") or (kind == "BPE" and any(affixes)):
            why = f"it is a {kind or 'nameless'} vocabulary" + (" with marked word ends" if kind == "BPE" else "")
            hint = "known are BPE (byte-level or with byte fallback) and WordPiece"
            raise CheckpointError(f"the vocabulary in `{folder}` cannot lose tokens", why=why, hint=hint)
        return cls(folder, data)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of every token, those added to the model's own included."""
        added = {token["content"]: token["id"] for token in self.data.get("added_tokens") or ()}
        return {**self.data["model"]["vocab"], **added}

    @cached_property
    def always(self) -> frozenset[int]:
        """Ids that always stay: added and unknown tokens, bytes, characters, and what no characters could say."""
        model, own = self.data["model"], self.data["model"]["vocab"]
        fixed = {token["id"] for token in self.data.get("added_tokens") or ()}
        fixed |= {own[name] for name in (model.get("unk_token"),) if name in own}
        prefix = model.get("continuing_subword_prefix") if "merges" not in model else ""
        for token, number in own.items():
            start = prefix if prefix and token.startswith(prefix) else ""
            rest = token[len(start) :]
            is_byte = len(token) == 6 and token.startswith("<0x")
            spelt = [start + rest[:1], *((prefix or "") + letter for letter in rest[1:])]
            if len(rest) <= 1 or is_byte or not all(part in own for part in spelt):
                fixed.add(number)
        return frozenset(fixed)

    @cached_property
    def merges(self) -> dict[tuple[str, str], int]:
        """Rank of every merge."""
        pairs = (tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in self.data["model"]["merges"])
        return {pair: rank for rank, pair in enumerate(pairs)}  # type: ignore[misc]

    def parts(self, token: str) -> set[int]:
        """Ids of the tokens that merges pass through on the way to a token, itself included; WordPiece has no others.

        With merges `a b`, `ab c` the token `abc` passes through a, b, c, ab and abc.
        """
        own = self.data["model"]["vocab"]
        if "merges" not in self.data["model"] or token not in own:
            return {self.ids[token]}
        symbols = list(token)
        found = {*symbols, token}
        while len(symbols) > 1:
            ranks = [self.merges.get(pair) for pair in pairwise(symbols)]
            known = [rank for rank in ranks if rank is not None]
            if not known:
                break
            place = ranks.index(min(known))
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
            found.add(symbols[place])
        return {own[symbol] for symbol in found if symbol in own}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens and uncut."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(json.dumps(self.data))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def write(self, folder: Path, kept: Sequence[int]) -> None:
        """Writes the tokenizer's files with some tokens left, numbered anew in the order given.

        Args:
            folder: holds copies of the files; those with ids in them are replaced, other forms of the vocabulary go.
            kept: old ids that stay, ascending.
        """
        new = {old: number for number, old in enumerate(kept)}
        own = {token: new[number] for token, number in self.data["model"]["vocab"].items() if number in new}
        model = {**self.data["model"], "vocab": own}
        if "merges" in model:
            stays = [pair[0] in own and pair[1] in own and "".join(pair) in own for pair in self.merges]
            model["merges"] = [merge for merge, stay in zip(model["merges"], stays, strict=True) if stay]
        added = [{**token, "id": new[token["id"]]} for token in self.data.get("added_tokens") or ()]
        data = {**self.data, "added_tokens": added, "model": model}
        if data.get("padding"):
            data["padding"] = {**data["padding"], "pad_id": new.get(data["padding"]["pad_id"], 0)}
        data["post_processor"] = _processor(data.get("post_processor"), new)
        write_text(folder / FILE, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
        self._write_others(folder, own, model, new)

    def _write_others(
        self, folder: Path, own: Mapping[str, int], model: Mapping[str, Any], new: Mapping[int, int]
    ) -> None:
        for name in STALE:
            (folder / name).unlink(missing_ok=True)
        if (folder / "vocab.txt").is_file():
            names = sorted({**own, **{t: new[i] for t, i in self.ids.items() if i in new}}.items(), key=lambda e: e[1])
            write_text(folder / "vocab.txt", "".join(f"{token}\n" for token, _ in names))
        if (folder / "vocab.json").is_file():
            write_json(folder / "vocab.json", own)
        if (folder / "merges.txt").is_file() and "merges" in model:
            lines = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
            write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{line}\n" for line in lines))
        if (folder / "added_tokens.json").is_file():
            found = json.loads((folder / "added_tokens.json").read_text("utf-8"))
            write_json(folder / "added_tokens.json", {token: new[number] for token, number in found.items()})
        if (folder / "tokenizer_config.json").is_file():
            config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            listed = config.get("added_tokens_decoder") or {}
            if listed:
                config["added_tokens_decoder"] = {str(new[int(number)]): token for number, token in listed.items()}
                write_json(folder / "tokenizer_config.json", config)


def _processor(part: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with its special tokens numbered anew."""
    if not isinstance(part, dict):
        return part
    changed = dict(part)
    if part.get("type") == "Sequence":
        changed["processors"] = [_processor(inner, new) for inner in part["processors"]]
    for name in ("sep", "cls"):
        if isinstance(part.get(name), list):
            changed[name] = [part[name][0], new[part[name][1]]]
    if isinstance(part.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: {**token, "ids": [new[number] for number in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
    return changed


def closed(vocabulary: Vocabulary, wanted: Iterable[int]) -> set[int]:
    """Ids that stay with all that they are built from, and those that always do."""
    names = {number: token for token, number in vocabulary.ids.items()}
    found = set(vocabulary.always)
    for number in wanted:
        if number not in found:
            found |= vocabulary.parts(names[number])
    return found
