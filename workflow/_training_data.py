"""What a student is trained on: images that its teacher made, or those of a folder with their captions. Clean latents, by index."""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from ..core.candidate import Seeds, canonical
from ..core.conditions import Conditions
from ..core.errors import UserError
from ..core.files import disk_errors
from ._subject import Subject
from .context import Context, remaining

if TYPE_CHECKING:
    from torch import Tensor

FASHION = "fashion-mnist-train.zip"  # what `python -m lissom.zoo.train --data-only` leaves in lissom's cache
METADATA = "metadata.jsonl"  # of a folder of images, as the datasets library reads it
TEXT, LABEL = ("text", "caption", "prompt"), ("label", "class_labels")  # keys of its lines
HELD = 512 * 2**20  # bytes of latents kept in memory, so that an image is encoded once


class Asked(Protocol):
    """What a stage says of its data."""

    @property
    def images(self) -> int:
        """How many the teacher makes, where it is the data."""

    @property
    def data_steps(self) -> int | None:
        """Solver steps of these; the pipeline's own number by default."""

    @property
    def flip(self) -> bool:
        """Whether images of a folder are shown mirrored too."""


class Taught:
    """Latents at the end of the teacher's own trajectories, made once and kept in the run's folder."""

    def __init__(self, stage: Asked, teacher: Subject, folder: Path) -> None:
        self.stage, self.teacher, self.folder = stage, teacher, folder / "data"
        self.steps = steps = stage.data_steps or teacher.default_steps
        self.seeds = seeds = Seeds(role="calibrate", base=teacher.context.recipe.seed, count=stage.images)
        self.facts: dict[str, object] = {
            "data": "the teacher's own trajectories",
            "images": stage.images,
            "steps of each": steps,
            "seeds": f"calibrate, base {seeds.base}",
        }
        scheduler = dict(teacher.model.pipe.scheduler.config)
        parts = [teacher.model.fingerprint, repr(scheduler), teacher.conditions.hash, repr(teacher.call), steps, seeds.base]
        self.signature = hashlib.sha256(canonical(parts).encode()).hexdigest()
        self.conditions = [i % len(teacher.conditions) for i in range(stage.images)]
        self.like: tuple[int, ...] = ()  # shape of what the denoiser takes, known when the pipeline has been asked

    def make(self) -> None:
        """Make what is missing; kill -9 loses a batch. UserError where the denoiser takes something else."""
        import torch
        from safetensors.torch import load_file, save_file

        stage, teacher, seeds = self.stage, self.teacher, self.seeds
        found: list[Tensor] = []
        while (path := self._path(sum(map(len, found)))).is_file():
            found.append(load_file(path)["latents"])
        done = sum(map(len, found))
        left = remaining(
            teacher.context.progress, f"the teacher's images, {self.steps} steps", seeds, done, teacher.context.options.chunk
        )
        if left is not None:
            with teacher.asking():
                for batch in teacher.sampler.images(None, left, steps=stage.data_steps, output="latents"):
                    assert batch.latents is not None
                    latents = batch.latents.float().cpu().contiguous()
                    with disk_errors(self.folder):
                        self.folder.mkdir(parents=True, exist_ok=True)
                        path = self._path(batch.indices.start)
                        save_file({"latents": latents}, path.with_suffix(".tmp"))
                        path.with_suffix(".tmp").replace(path)
                    found.append(latents)
                    teacher.context.progress.advance()
        self.latents = torch.cat(found)[: stage.images]
        if tuple(self.latents.shape[1:]) != self.like:
            raise UserError(
                f"{type(teacher.model.pipe).__name__}: ends with latents of {tuple(self.latents.shape[1:])} and gives its denoiser "
                f"{self.like}; how to noise them is not known here. Train the plain pipeline of the same denoiser."
            )

    def _path(self, start: int) -> Path:
        return self.folder / f"{self.signature[:12]}-{start:07}.safetensors"

    def __call__(self, images: Sequence[int]) -> "Tensor":
        """Clean latents, (B, …) float32."""
        return self.latents[list(images)]


class Folder:
    """Images of a folder or zip, encoded by the pipeline's VAE when they come up."""

    def __init__(self, stage: Asked, source: Path, teacher: Subject) -> None:
        """Refuses what could not be trained on: no captions where the pipeline needs some, no readable images."""
        from ..evaluate._images import Images

        self.teacher, self.flip = teacher, stage.flip
        self.images = Images(source)
        self._read = self.images.reader()
        rows = metadata(source)
        needed = _needed(teacher)
        names, conditions = [], []
        for name in self.images.names:
            row = rows.get(name)
            if row is None and needed is not None:
                continue
            names.append(name)
            conditions.append(_condition(row or {}, needed, f"{source}: {name}"))
        if needed is not None and not names:
            raise UserError(
                f"{source}: says nothing about its images, and {type(teacher.model.pipe).__name__} needs a {needed} for each. Put a "
                f'{METADATA} beside them with a line for each image: {{"file_name": "0001.png", "text": "a photo of a dog"}}.'
            )
        if left_out := len(self.images.names) - len(names):
            teacher.context.progress.warn(f"{source}: {left_out} images are not in {METADATA}, they are left out")
        self.names = names * 2 if stage.flip else names
        self.half = len(names)
        distinct = {canonical(row): row for row in conditions}
        place = {key: i for i, key in enumerate(distinct)}
        self.rows = Conditions(list(distinct.values()), str(source), source if source.is_dir() else Path())
        self.conditions = [place[canonical(row)] for row in conditions] * (2 if stage.flip else 1)
        self.signature = hashlib.sha256(
            canonical([list(self.images.stamps()), stage.flip, self.rows.hash]).encode()
        ).hexdigest()
        self.facts: dict[str, object] = {"data": str(source), "images": self.half, "shown mirrored too": stage.flip}
        self.like: tuple[int, ...] = ()  # shape of a latent, known when the pipeline has been asked
        self._held: dict[int, Tensor] = {}
        self._bytes = 0
        self._unreadable: set[str] = set()

    def make(self) -> None:
        """Nothing: images are read when they come up."""

    def __call__(self, images: Sequence[int]) -> "Tensor":
        """Clean latents, (B, …) float32. An image that cannot be read is replaced by the next that can, and said so once."""
        import torch

        missing = sorted({i for i in images if i not in self._held})
        if missing:
            from ..core.calibration import encoded

            pixels = [self._pixels(i) for i in missing]
            latents = encoded(self.teacher.model.pipe, pixels, self.like)
            self._held |= dict(zip(missing, latents.cpu(), strict=True))
            self._bytes += latents.numel() * 4
        found = torch.stack([self._held[i] for i in images])
        while self._bytes > HELD and len(self._held) > 1:
            self._bytes -= self._held.pop(next(iter(self._held))).numel() * 4
        return found

    def _pixels(self, index: int) -> "Tensor":
        for i in (*range(index, len(self.names)), *range(index)):
            name = self.names[i]
            pixels = self._read(name)
            if pixels is not None:
                return pixels.flip(1) if i >= self.half else pixels
            if name not in self._unreadable:
                self._unreadable.add(name)
                self.teacher.context.progress.warn(
                    f"{self.images.source}: {name} cannot be read; the next image takes its place"
                )
        raise UserError(f"{self.images.source}: none of its {self.half} images can be read.")


def metadata(source: Path) -> dict[str, dict[str, Any]]:
    """The lines of metadata.jsonl by file name; nothing where there is none. UserError for what is wrong in it, line by line."""
    text = None
    if source.is_dir() and (source / METADATA).is_file():
        text = (source / METADATA).read_text(encoding="utf-8")
    elif source.is_file() and zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            if METADATA in archive.namelist():
                text = archive.read(METADATA).decode("utf-8")
    found, wrong = {}, []
    for number, line in enumerate((text or "").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[PurePosixPath(row.pop("file_name")).as_posix()] = row
        except (ValueError, KeyError, AttributeError, TypeError):
            wrong.append(f'{source / METADATA}:{number}: expected {{"file_name": …, "text": …}}, got {line.strip()[:60]}')
    if wrong:
        raise UserError("\n".join(wrong[:20]))
    return found


def _needed(teacher: Subject) -> str | None:
    """What the pipeline must be told of every image."""
    import inspect

    accepted = inspect.signature(type(teacher.model.pipe).__call__).parameters
    return next((key for key in ("prompt", "class_labels") if key in accepted), None)


def _condition(row: dict[str, Any], needed: str | None, where: str) -> dict[str, Any]:
    """The call arguments for an image. UserError where its line lacks what the pipeline needs."""
    if needed is None:
        return {}
    keys = TEXT if needed == "prompt" else LABEL
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    if not isinstance(value, str if needed == "prompt" else int):
        raise UserError(
            f"{where}: its line in {METADATA} has no {' or '.join(keys)}, which is what the pipeline is told to paint by."
        )
    return {needed: value}


def source_of(given: str, context: Context) -> Path:
    """The folder or zip that a stage means; zoo:fashion is made by `python -m lissom.zoo.train --data-only`. UserError if missing."""
    if not given.startswith("zoo:"):
        return Path(context.path(given))
    from ..evaluate._download import cache

    if given != "zoo:fashion":
        raise UserError(f"data: {given}: there are training images of zoo:fashion only. Give it, a folder, or teacher.")
    path = cache() / FASHION
    if not path.is_file():
        raise UserError(
            f"{path}: the images that zoo:fashion was trained on are not here. Make the file with `python -m lissom.zoo.train "
            "--data-only` (needs Debian's dataset-fashion-mnist), or leave data out: the teacher's own images serve as well."
        )
    return path
