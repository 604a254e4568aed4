"""Image classification by nearest neighbours and a linear probe on frozen vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError
from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.images import Picture
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Images:
    """Accuracy of k nearest neighbours (by cosine) and of logistic regression on the CLS vector.

    Images are resized to the model's size and normalised as its `preprocessor_config.json` says, else as ImageNet. A
    zip file or folder holds a folder for each class.

    Args:
        data: zip file or folder to judge on.
        train: zip file or folder to fit on.
        limit: images judged, the same number of each class; null takes all.
        train_limit: images fitted on; null takes all.
        neighbours: k.
        size: height and width in pixels that the model gets; null takes its configuration's.
    """

    data: Annotated[str, Field(min_length=1, strict=True)]
    train: Annotated[str, Field(min_length=1, strict=True)]
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    train_limit: Annotated[int, Field(ge=2, strict=True)] | None = None
    neighbours: Annotated[int, Field(ge=1, strict=True)] = 10
    size: Annotated[int, Field(ge=1, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("images",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("knn", "linear")

    def load(self) -> tuple[Sequence[Picture], Sequence[Picture]]:
        """Images to fit on and images to judge on."""
        from prunekit.evaluate.images import read_images

        train, dev = read_images(self.train, self.train_limit), read_images(self.data, self.limit)
        known = {picture.label for picture in train}
        if len(known) < 2:
            raise UsageError(f"`{self.train}` has one class only", why="a probe tells classes apart")
        for picture in dev:
            if picture.label not in known:
                raise UsageError(f"the class `{picture.label}` is not in `{self.train}`", at=picture.at)
        return train, dev

    def prepare(self, data: Any, subject: Subject) -> tuple[list[Picture], int, list[list[int]]]:
        """Images to fit on, then those to judge on, each opened once; their size; and the labels of both."""
        from prunekit.evaluate.images import colours, pixels

        size = self.size or subject.config["image_size"]
        if not isinstance(size, int):
            raise UsageError("only square images are known here", why=f"`image_size` is {size}", hint="give `size`")
        train, dev = data
        names = sorted({picture.label for picture in train})
        pictures = [*train, *dev]
        for picture in pictures:
            pixels(picture, size, *colours(subject.folder))
        labels = [[names.index(picture.label) for picture in part] for part in data]
        return pictures, size, labels

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Shares of images classified rightly."""
        import torch

        from prunekit.evaluate.features import image_vectors
        from prunekit.evaluate.images import colours, pixels
        from prunekit.evaluate.probe import linear_probe, nearest_neighbours

        pictures, size, (train, dev) = prepared
        mean, std = colours(subject.folder)
        vectors = image_vectors(
            subject, len(pictures), lambda number: pixels(pictures[number], size, mean, std), progress
        )
        labels, right = torch.tensor(train), torch.tensor(dev)
        fit, judged, classes = vectors[: len(train)], vectors[len(train) :], max(train) + 1
        found = {
            "knn": nearest_neighbours(fit, labels, judged, classes, self.neighbours),
            "linear": linear_probe(fit, labels, judged, classes),
        }
        return {
            name: Figure.of("mean", (guess == right).double().tolist(), better="higher")
            for name, guess in found.items()
        }
