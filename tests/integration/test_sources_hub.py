"""Downloads from a hub on this machine: what is fetched, and what is said when something is not there."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from prunekit.checkpoint.sources import resolve
from prunekit.core.errors import CheckpointError

pytestmark = pytest.mark.network

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = save({"a": torch.arange(4.0)})
MODELS = {
    "me/sharded": {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode(),
        "model-00001-of-00001.safetensors": SHARD,
        "consolidated.safetensors": SHARD,
        "pytorch_model.bin": b"pickle",
        "onnx/config.json": b"{}",
        "tokenizer.json": b"{}",
    },
    "me/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        name = next((name for name in MODELS if f"{name}/" in f"{path}/"), None)
        if name is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        files = MODELS[name]
        if path.startswith("api/") and f"/{COMMIT}" not in path and "/main" not in path:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if path.startswith("api/") and "/tree/" in path:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in files.items()
            ]
            return self._send(200, json.dumps(entries).encode(), {}, body)
        if path.startswith("api/"):
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        file = path.partition(f"/resolve/{COMMIT}/")[2]
        data = files[file]
        if body:
            self.asked.append(file)
        return self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha256(data).hexdigest()}, body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Points the client at a hub of our own and its cache at an empty folder; yields the files it was asked for."""
    import huggingface_hub.constants as constants

    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Asked", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    server.shutdown()
    server.server_close()


def test_download_fetches_the_indexed_shards_and_text_only(hub: list[str]) -> None:
    found = resolve("me/sharded")
    assert (found.kind, found.name, found.revision) == ("hub", "me/sharded", COMMIT)
    files = {file.name for file in found.folder.iterdir()}
    assert files == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }
    assert len(hub) == len(set(hub)) == len(files)


def test_downloaded_model_is_found_again_offline(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    first = resolve("me/sharded", revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("me/sharded", revision="main") == first
    assert resolve("me/sharded", revision=COMMIT) == first


def test_hub_model_with_pickles_alone_is_refused(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"`pytorch_model\.bin` is a pickle"):
        resolve("me/pickled")
    assert "pytorch_model.bin" not in hub


def test_unknown_hub_model_says_so(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match="no model `me/nothing`"):
        resolve("me/nothing")


def test_unknown_revision_says_so(hub: list[str]) -> None:
    with pytest.raises(CheckpointError, match="has no revision `v9`"):
        resolve("me/sharded", revision="v9")
