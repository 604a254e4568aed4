"""Image classification by the model's own head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import EvaluationError, UsageError
from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.images import Picture
    from prunekit.evaluate.subject import Subject

_HEAD = "ForImageClassification"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Classify:
    """Share of images whose class is the head's first choice, and the negative log-likelihood of their class.

    The folder that an image lies in names its class, as the model's `id2label` does, or by number. Images are resized
    and normalised as by `images`.

    Args:
        data: zip file or folder with a folder for each class.
        limit: images, the same number of each class; null takes all.
        size: height and width in pixels that the model gets; null takes its configuration's.
    """

    data: Annotated[str, Field(min_length=1, strict=True)]
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    size: Annotated[int, Field(ge=1, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("images",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("acc", "answer_nll")

    def load(self) -> Sequence[Picture]:
        """Images."""
        from prunekit.evaluate.images import read_images

        return read_images(self.data, self.limit)

    def prepare(self, data: Sequence[Picture], subject: Subject) -> tuple[Sequence[Picture], int, list[int]]:
        """Images, each opened once; their size; and the number of each one's class."""
        from prunekit.evaluate.images import colours, pixels

        if not any(str(name).endswith(_HEAD) for name in subject.config.get("architectures") or ()):
            hint = "`images:dev.zip,train=train.zip` measures frozen vectors"
            raise UsageError(f"`{subject.name}` has no head that names classes", hint=hint)
        size = self.size or subject.config["image_size"]
        if not isinstance(size, int):
            raise UsageError("only square images are known here", why=f"`image_size` is {size}", hint="give `size`")
        named = subject.config.get("id2label") or {}
        numbers = {str(label): int(number) for number, label in named.items()}
        numbers |= {str(number): int(number) for number in named}
        for picture in data:
            if picture.label not in numbers:
                why = f"its classes are such as {', '.join(list(numbers)[:3])}" if numbers else "it has no `id2label`"
                raise UsageError(f"`{subject.name}` has no class `{picture.label}`", why=why, at=picture.at)
            pixels(picture, size, *colours(subject.folder))
        return data, size, [numbers[picture.label] for picture in data]

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """Figures over images."""
        import torch

        from prunekit.evaluate.images import colours, pixels

        pictures, size, labels = prepared
        model, look, logs = subject.model, colours(subject.folder), []
        with torch.no_grad(), progress.task("classifying", total=len(pictures), unit="images") as task:
            for first in range(0, len(pictures), subject.batch_size):
                some = pictures[first : first + subject.batch_size]
                batch = torch.stack([pixels(picture, size, *look) for picture in some]).to(model.device, model.dtype)
                logs.append(model(pixel_values=batch).logits.double().log_softmax(-1).cpu())
                task.advance(len(some))
        found = torch.cat(logs)
        if bool(found.isnan().any()):
            raise EvaluationError("a class has no likelihood", why="the model's logits hold NaN")
        right = torch.tensor(labels)
        nll = -found[torch.arange(len(right)), right]
        return {
            "acc": Figure.of("mean", (found.argmax(-1) == right).double().tolist(), better="higher"),
            "answer_nll": Figure.of("mean", nll.tolist(), better="lower"),
        }
