"""A folder's tokenizer as metadata of a GGUF file: tokens, merges, special tokens, chat template.

llama.cpp knows the ways of splitting text before BPE by name only, so a tokenizer whose way has no name is refused: it
would load and give other tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import ExportError

if TYPE_CHECKING:
    import gguf

_FILE = Path(__file__).with_name("pre_tokenizers.yaml")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Args:
        model: `gpt2` for byte-level BPE, `llama` for the BPE of SentencePiece.
        pre: llama.cpp's name of the pre-tokenizer, "" where the model needs none.
        tokens: by id; rows of the embedding without a token are called `[PAD7]`.
        types: of each, as numbers of `gguf.TokenType`.
        scores: of each, empty for `gpt2`.
        adds: whether a text gets a `bos` and an `eos` token.
        folder: where merges, special tokens and the chat template are read.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    adds: dict[str, bool]
    folder: Path


def read_vocabulary(folder: Path, n_vocab: int) -> Vocabulary:
    """The tokenizer of a folder.

    Args:
        folder: of a checkpoint.
        n_vocab: rows of the token embedding.
    Raises:
        ExportError: if there is none, or llama.cpp would split text in another way.
    """
    from prunekit.modeling.load import load_tokenizer

    file = folder / "tokenizer.json"
    tokenizer = load_tokenizer(folder) if file.is_file() else None
    if tokenizer is None:
        why = "the tokenizer is part of a GGUF file"
        raise ExportError(f"`{folder}` has no tokenizer.json", why=why, hint="put the model's own there")
    data = json.loads(file.read_text("utf-8"))
    sentencepiece = bool(data["model"].get("byte_fallback"))
    if data["model"].get("type") != "BPE":
        raise _refused(f"it is {data['model'].get('type')}, and BPE is written")
    if sentencepiece:
        _require_sentencepiece(data)
    tokens, types = _tokens(data, n_vocab)
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="" if sentencepiece else pre_tokenizer(data),
        tokens=tokens,
        types=types,
        scores=_scores(data, tokens) if sentencepiece else (),
        adds=_added(tokenizer),
        folder=folder,
    )


def write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Adds the metadata to a file that is being written."""
    import gguf

    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
    special = gguf.SpecialVocab(
        vocabulary.folder, load_merges=vocabulary.model == "gpt2", n_vocab=len(vocabulary.tokens)
    )
    special.add_special_token = dict(vocabulary.adds)
    special.add_to_gguf(writer, quiet=True)


def pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a tokenizer.json splits text.

    Raises:
        ExportError: if there is no name for it.
    """
    normaliser = data.get("normalizer")
    # llama.cpp does not compose characters: NFC changes nothing in text that is composed, which most is.
    if normaliser is not None and normaliser.get("type") != "NFC":
        raise _refused(f"its normaliser is {normaliser.get('type')}")
    splits = _splits(data.get("pre_tokenizer"))
    ignores = bool(data["model"].get("ignore_merges"))
    for name, known in _known().items():
        if known["splits"] == splits and known["ignore_merges"] == ignores:
            return name
    raise _refused("it splits text in a way that llama.cpp has no name for, or none that prunekit knows")


@cache
def _known() -> dict[str, dict[str, Any]]:
    import yaml

    found: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return found


def _refused(why: str) -> ExportError:
    return ExportError(
        "the tokenizer cannot be said in a GGUF file",
        why=why,
        hint=f"known ways of splitting are {', '.join(_known())}; llama.cpp's own converter may know more",
    )


def _splits(step: dict[str, Any] | None) -> list[str]:
    """Steps of a pre-tokenizer, in the words of `pre_tokenizers.yaml`; what has none is named so that it is unknown."""
    kind = (step or {}).get("type")
    if step is None or kind is None:
        return ["nothing"]
    if kind == "Sequence":
        return [split for part in step["pretokenizers"] for split in _splits(part)]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["gpt2"] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [str(step["pattern"].get("Regex", step["pattern"]))]
    return [f"{kind} as it is set here"]


def _tokens(data: dict[str, Any], n_vocab: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Text and type of every row of the embedding."""
    from gguf import TokenType

    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [int(TokenType.UNUSED)] * n_vocab
    added = {entry["id"]: entry for entry in data.get("added_tokens") or ()}
    last = max([*data["model"]["vocab"].values(), *added])
    if last >= n_vocab:
        raise _refused(f"it has a token {last}, and the model's embedding {n_vocab} rows")
    for text, number in data["model"]["vocab"].items():
        tokens[number], types[number] = text, int(TokenType.NORMAL)
    if data["model"].get("byte_fallback"):
        for byte in range(256):
            number = data["model"]["vocab"].get(f"<0x{byte:02X}>")
            if number is not None:
                types[number] = int(TokenType.BYTE)
    for number, entry in added.items():
        tokens[number] = entry["content"]
        types[number] = int(TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED)
    unknown = data["model"]["vocab"].get(data["model"].get("unk_token"))
    if unknown is not None and data["model"].get("byte_fallback"):
        types[unknown] = int(TokenType.UNKNOWN)
    return tuple(tokens), tuple(types)


def _added(tokenizer: Any) -> dict[str, bool]:
    """Whether a text gets a first and a last special token."""
    ids = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    front, back = len(ids) > len(plain) and ids[0] != plain[0], len(ids) > len(plain) and ids[-1] != plain[-1]
    if (front and ids[0] != tokenizer.bos_token_id) or (back and ids[-1] != tokenizer.eos_token_id):
        raise _refused("it puts other tokens round a text than `bos` and `eos`")
    return {"bos": front, "eos": back}


def _require_sentencepiece(data: dict[str, Any]) -> None:
    """Tokenizers of Llama 2 and Mistral: a space for each word begin, written as `▁`, and nothing else."""
    mark = "▁"
    prepended = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": mark},
            {"type": "Replace", "pattern": {"String": " "}, "content": mark},
        ],
    }
    if data.get("normalizer") != prepended or data.get("pre_tokenizer") is not None:
        raise _refused("it falls back to bytes, and is not made as those of Llama 2 are")


def _scores(data: dict[str, Any], tokens: tuple[str, ...]) -> tuple[float, ...]:
    """The earlier a merge makes a token, the higher its score; llama.cpp merges by scores and knows no merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(data["model"]["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return tuple(-float(ranks.get(token, len(ranks))) for token in tokens)
