"""Loads one folder in a process of its own and writes down what it saw; run as a script by `verify`.

It must work where prunekit cannot be imported, so it imports nothing of prunekit.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class _NoPrunekit:
    """Import hook for a process that must do without prunekit, installed or not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuses prunekit and leaves every other name to the hooks after it."""
        if name == "prunekit" or name.startswith("prunekit."):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def main(request_file: str) -> None:
    """Answers a request file.

    Args:
        request_file: JSON written by `verify`: `sys_path`, `folder`, `way` (prunekit | plain | remote_code),
            `architecture`, `auto_class` ("" for the class itself), `dtype`, `threads`, `texts`, `new_tokens`, and the
            files `inputs` (read), `outputs`, `result` (written).
    """
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    sys.path[:] = request["sys_path"]
    try:
        result = _answer(request)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]}
    with open(request["result"], "w", encoding="utf-8") as file:
        json.dump(result, file)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if request["way"] == "prunekit":
        import prunekit  # noqa: F401
    else:
        sys.meta_path.insert(0, _NoPrunekit())
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["threads"])
    folder, trust = request["folder"], request["way"] == "remote_code"
    if trust:
        try:
            transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            result["refused_untrusted"] = False
        except ValueError:
            result["refused_untrusted"] = True
    cls = getattr(transformers, request["auto_class"] or request["architecture"])
    options: dict[str, Any] = {"trust_remote_code": True} if trust else {}
    dtype = getattr(torch, request["dtype"])
    # The grouped products that transformers runs experts by know no float64.
    options |= {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    model.eval()
    result["class"] = type(model).__name__
    result["keys"] = {
        kind: sorted(str(key) for key in info.get(kind) or ())
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    inputs = {name: _as(tensor, dtype) for name, tensor in load_file(request["inputs"]).items()}
    decoder = model.can_generate()
    with torch.no_grad():
        output = model(**inputs, use_cache=True) if decoder else model(**inputs)
    save_file({"outputs": output[0].contiguous()}, request["outputs"])
    entry, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and entry is not None:
        result["tied"] = head.weight is entry.weight
        result["tie_expected"] = bool(getattr(model.config, "tie_word_embeddings", False))
    if decoder:
        # Its name from transformers 5.24 on, and before.
        cache = output.cache if hasattr(output, "cache") else output.past_key_values
        # What a decoder that reads an encoder keeps of its own tokens.
        cache = getattr(cache, "self_attention_cache", cache)
        layers = getattr(cache, "layers", ())
        held = [layer.keys for layer in layers if getattr(layer, "keys", None) is not None]
        result["kv_heads"] = [int(keys.shape[1]) for keys in held if keys.numel()]
        result |= _continuations(model, inputs, request["new_tokens"])
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        result |= _round_trip(tokenizer, request["texts"])
    return result


def _as(tensor: Any, dtype: Any) -> Any:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _continuations(model: Any, inputs: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens of the padded batch with and without a cache, and of every row alone without padding."""
    if "decoder_input_ids" in inputs:
        return _written(model, inputs, new_tokens)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    length = ids.shape[1]

    def tokens(ids: Any, mask: Any, use_cache: bool) -> list[list[int]]:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )
        return [row.tolist() for row in made[:, ids.shape[1] :]]

    alone = []
    for row in range(len(ids)):
        start = length - int(mask[row].sum())
        alone += tokens(ids[row : row + 1, start:], mask[row : row + 1, start:], True)
    return {"cached": tokens(ids, mask, True), "uncached": tokens(ids, mask, False), "alone": alone}


def _written(model: Any, inputs: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """The same of a model with an encoder and a decoder."""
    import transformers

    # Of a class that goes through sound in a loop of its own, the plain one.
    generate = transformers.GenerationMixin.generate
    if model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0

    def tokens(inputs: dict[str, Any], use_cache: bool) -> list[list[int]]:
        begin = inputs["decoder_input_ids"]
        amount = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        made = generate(model, **inputs, **amount, do_sample=False, use_cache=use_cache, pad_token_id=0)
        return [row.tolist() for row in made[:, begin.shape[1] :]]

    alone: list[list[int]] = []
    for row in range(len(inputs["decoder_input_ids"])):
        own = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        if "attention_mask" in own:
            length = int(own["attention_mask"].sum())
            own |= {name: own[name][:, :length] for name in ("input_ids", "attention_mask")}
        alone += tokens(own, True)
    return {"cached": tokens(inputs, True), "uncached": tokens(inputs, False), "alone": alone}


def _round_trip(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Ids of texts, and the ids after decoding and encoding once more."""
    first = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    again = [tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] for ids in first]
    chat = ""
    if getattr(tokenizer, "chat_template", None):
        chat = tokenizer.apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
    return {"token_ids": first, "token_ids_again": again, "chat": chat}


if __name__ == "__main__":
    main(sys.argv[1])
