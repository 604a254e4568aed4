"""Blocks of the pages that speak of your model, your data or several machines, run with small ones in their place.

Each line runs by itself, so that two ways of doing the same thing may stand in one block.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from prunekit.checkpoint.sources import resolve
from prunekit.plan.costs import read_costs
from prunekit.structure.view import ModelView
from tests.pages import ROOT, Block, blocks, recipes, run
from tests.tiny import write_tiny

# What a command says, and what is run: small models for large ones, two processes for many, one machine for two.
STAND_INS = {
    "smollm2-135m-instruct": "path/to/model",
    "--recipe smollm2-finercut": "--recipe my.yaml",
    "--recipe fast.yaml": "--recipe small-fast.yaml",
    "--nproc-per-node 4": "--nproc-per-node 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--num_processes 4": "--num_processes 2",
    "--nnodes 2": "--nnodes 1",
    "first-host:29500": "localhost:0",
    "--output /shared/": "--output ",
}
SHORT = " --steps 2 --set heal.length_tokens=16 --set heal.batch=2"
MY_RECIPE = """\
schema: 1
model: {source: path/to/model}
calibrate: {data: wikitext2, sequences: 2, length_tokens: 16}
steps:
  - remove: blocks
    by: {score: last_k}
    budget: {units: 1}
evaluate: {perplexity: {data: wikitext2_eval, sequences: 2, length_tokens: 16}}
"""
SLICES = """\
slices:
  - sources: [{model: path/to/model, layer_range: [0, 2]}]
  - sources: [{model: path/to/model, layer_range: [3, 4]}]
merge_method: passthrough
dtype: float32
"""
# Installation, and the targets of the Makefile, which run these tests themselves.
CHECKED_OTHERWISE = ("make ", "pip ")


FIRST = ("prunekit", "torchrun", "accelerate", "make", "pip")


def lines() -> list[tuple[str, str]]:
    """Page and text of every command in blocks without a language, `&&` and all."""
    found = []
    for block in blocks():
        if block.language == "" and block.text.split()[0] in FIRST:
            text = block.text.replace("\\\n", " ")
            found += [(block.page, line.partition("  #")[0].strip()) for line in text.splitlines() if line.strip()]
    return found


COMMANDS = [(page, line) for page, line in lines() if not line.startswith(CHECKED_OTHERWISE)]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the commands read."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("pages")
    model = write_tiny("llama", folder / "path" / "to" / "model", vocab_size=49152, max_position_embeddings=4096)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(resolve("smollm2-135m-instruct").folder / name, model / name)
    for name in ("my-model", "dense"):
        shutil.copytree(model, model.with_name(name))
    for name in ("my.yaml", "my-recipe.yaml"):
        (folder / name).write_text(MY_RECIPE)
    (folder / "slices.yaml").write_text(SLICES)
    rows = [{"text": f"{'a red' if i % 2 else 'the blue'} word, number {i}", "label": i % 2} for i in range(64)]
    for name in ("train.jsonl", "corpus.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    ViTForImageClassification(
        ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
            id2label={0: "dark", 1: "light"},
        )
    ).save_pretrained(folder / "vit")  # fmt: skip
    for name in ("train.zip", "dev.zip"):
        with zipfile.ZipFile(folder / name, "w") as packed:
            for number in range(8):
                shade, label = (40 + number, "dark") if number % 2 else (200 + number, "light")
                Image.new("RGB", (32, 32), (shade, shade, shade)).save(folder / "one.png")
                packed.write(folder / "one.png", f"{label}/{number}.png")
    make = (
        "prunekit prune --recipe my.yaml --output out/small",
        "prunekit plan --recipe my.yaml --output plan.json",
        "prunekit costs path/to/model --no-widths --tokens 128 --repeats 1 --output costs.json",
        "prunekit prune vit --remove blocks --fraction 0.3 --method last_k --output out/vit",
        "prunekit data score train.jsonl --metric el2n",
        "python -c \"import pandas as p; p.read_json('train.jsonl', lines=True).to_parquet('train.parquet')\"",
    )
    run(Block("ready", "bash", "\n".join(make)), folder)
    costs = read_costs(folder / "costs.json")
    # The recipe of the page, with a time that a small model can be asked for.
    fast = recipes()["fast.yaml"].replace("smollm2-135m-instruct", "path/to/model")
    limit = 0.7 * costs.predict(ModelView.open(model))
    (folder / "small-fast.yaml").write_text(fast.replace("latency_ms: 700", f"latency_ms: {limit}"))
    for name in ("serve", "demo"):
        shutil.copytree(folder / "out" / "small", folder / "out" / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{line.split()[1]}" for page, line in COMMANDS])
def test_command_runs_with_stand_ins(page: str, line: str, ready: Path, tmp_path: Path) -> None:
    if "--config_file" in line and torch.cuda.device_count() < 4:
        pytest.skip("the configuration is of four GPUs")
    folder = tmp_path / "work"
    shutil.copytree(ready, folder, symlinks=True)
    for said, instead in STAND_INS.items():
        line = line.replace(said, instead)
    line += SHORT * (" heal " in line)
    for output in re.findall(r"--output (\S+)", line):
        place = folder / output
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    if "data score" in line:
        for left in folder.glob("train.scores.*"):
            left.unlink()
    run(Block(page, "bash", line), folder)
    for output in re.findall(r"--output (\S+)", line):
        assert (folder / output).exists()


def test_no_command_stands_outside_what_is_run() -> None:
    """Blocks without a language that begin with something else are output."""
    begun = [block for block in blocks() if block.language == "" and block.text.split()[0] not in FIRST]
    assert not [block for block in begun if re.search(rf"^({'|'.join(FIRST)}) ", block.text, flags=re.MULTILINE)]
    assert {block.language for block in blocks()} <= {"", "bash", "yaml", "python"}


def test_what_is_not_run_names_what_exists() -> None:
    named = [line.split() for _, line in lines() if line.startswith(CHECKED_OTHERWISE)]
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    assert named
    for tool, *words in named:
        if tool == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE), words
        else:
            extras = re.search(r"\[(.*)\]", words[-1])
            assert extras
            for extra in extras[1].split(","):
                assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra
