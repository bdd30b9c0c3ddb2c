"""Reference images from a folder or a zip: a fixed order, RGB, one by one, and what could not be read is named.

Shapes: H x W pixels of one image.
"""

import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import UserError
from ._statistics import image_hash

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# What a damaged image or archive member can raise in PIL, zipfile and zlib (an encrypted member: RuntimeError). PIL's own list
# ends with SyntaxError; LookupError, TypeError, ArithmeticError and struct.error come from its decoders all the same.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    Image.DecompressionBombError,
)


class Images:
    """Iterate for uint8 pixels (1, H, W, 3); `skipped` then names what could not be read, `converted` counts what was not
    plain 8-bit RGB (see `decode`).

    `split` keeps one half of the images: which one an image belongs to is a function of its pixels, so that no
    image, nor a copy of it under another name, is in both.
    """

    def __init__(self, source: Path, split: Literal["search", "report"] | None = None) -> None:
        """Raises UserError if the source is neither a folder nor a zip, or has fewer than 2 image files."""
        self.source, self.split = source, split
        self.skipped: list[str] = []
        self.converted: Counter[str] = Counter()
        with ExitStack() as stack:
            self.names = sorted(self._open(stack)[0])
        if len(self.names) < 2:
            raise UserError(f"{source}: {_images(len(self.names))} in it, a reference needs at least 2 ({_endings()}).")

    def __iter__(self) -> Iterator[Tensor]:
        """Raises UserError at the end if fewer than 2 images could be read, or fell to this half."""
        self.skipped, self.converted, given = [], Counter(), 0
        for name, pixels, kinds in self.pictures(self.names):
            if pixels is None:
                self.skipped.append(printable(name))
            elif self.takes(pixels):
                self.converted.update(kinds)
                given += 1
                yield pixels[None]
        self.check(len(self.names) - len(self.skipped), given, self.skipped)

    def pictures(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor | None, tuple[str, ...]]]:
        """Some of `names`, one by one: name, pixels (H, W, 3), and what was converted; pixels None if it cannot be read."""
        with ExitStack() as stack:
            _, read = self._open(stack)
            for name in names:
                found: tuple[Tensor | None, tuple[str, ...]] = None, ()
                with suppress(*UNREADABLE):
                    found = decode(read(name))
                yield name, *found

    def reader(self) -> Callable[[str], Tensor | None]:
        """A function from one of `names` to its pixels (H, W, 3), None if it cannot be read. It keeps a zip open."""
        _, read = self._open(ExitStack())

        def pixels(name: str) -> Tensor | None:
            with suppress(*UNREADABLE):
                return decode(read(name))[0]
            return None

        return pixels

    def takes(self, pixels: Tensor) -> bool:
        """Whether an image (H, W, 3) is in the half that is asked for."""
        return self.split is None or half(pixels) == self.split

    def check(self, readable: int, given: int, skipped: Sequence[str]) -> None:
        """Raises UserError if fewer than 2 images could be read, or fell to this half."""
        if readable < 2:
            raise UserError(
                f"{self.source}: {readable} of its {_images(len(self.names))} can be read, a reference needs at least 2"
                f" (unreadable: {', '.join(skipped[:3])}{', …' if len(skipped) > 3 else ''})."
            )
        if given < 2:
            raise UserError(
                f"{self.source}: {given} of its {_images(readable)} fell to the half for {self.split}, which needs at least 2."
                " Give more images, or a statistics file."
            )

    def signature(self) -> list[list[str | int]]:
        """Name, size and time of every file: changes when the images do, without reading them."""
        return list(self.stamps())

    def stamps(self) -> Iterator[list[str | int]]:
        """`signature`, file by file."""
        if not self.source.is_dir():
            yield _stamp(self.source, self.source.name)
            return
        for name in self.names:
            yield _stamp(self.source / name, name)

    def _open(self, stack: ExitStack) -> tuple[list[str], Callable[[str], bytes]]:
        """The image files' names, with / between folders, and a function from a name to its bytes."""
        if self.source.is_dir():
            return list(_walk(self.source)), lambda name: (self.source / name).read_bytes()
        try:
            archive = stack.enter_context(zipfile.ZipFile(self.source))
        except FileNotFoundError as e:
            raise UserError(f"{self.source}: no such folder or file. Give an image folder, a zip or a statistics file.") from e
        except (zipfile.BadZipFile, OSError) as e:
            raise UserError(f"{self.source}: neither a folder nor a readable zip ({e}).") from e
        return [name for name in archive.namelist() if _is_image(name)], archive.read


def rgb(content: bytes) -> Tensor:
    """The first frame of an encoded image as uint8 (H, W, 3), as `decode` gives it."""
    return decode(content)[0]


def decode(content: bytes) -> tuple[Tensor, tuple[str, ...]]:
    """The first frame of an encoded image as uint8 (H, W, 3), and what it was, if not plain 8-bit RGB.

    Alpha is dropped, as clean-fid does. 16-bit grey is scaled to 8 bits (PIL alone would clip it to white). Rotation notes
    of cameras are not followed, as clean-fid does not. Raises one of UNREADABLE for what is damaged, and for floating-point
    pixels, whose range nobody knows.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PIL, about odd but readable files
        with Image.open(BytesIO(content)) as image:
            if image.mode == "F":
                raise ValueError("floating-point pixels")
            kinds = _kinds(image)
            if image.mode.startswith("I"):
                grey = (np.asarray(image, dtype=np.int64) / 257).round().clip(0, 255).astype(np.uint8)  # (H, W)
                pixels = torch.from_numpy(grey)[..., None].repeat(1, 1, 3)
            else:
                pixels = torch.from_numpy(np.array(image.convert("RGB")))
            with suppress(*UNREADABLE):  # a damaged second frame does not matter; asking for it moves to it, so ask last
                if getattr(image, "is_animated", False):
                    kinds = ("animated", *kinds)
            return pixels, kinds


def _kinds(image: Image.Image) -> tuple[str, ...]:
    """What has to be converted, before the pixels are read: then PIL still knows how the file holds them."""
    mode = image.mode
    held = str(getattr(image, "tile", ""))  # e.g. "RGB;16B": PIL itself makes 8 bits of it
    found = {
        "16-bit": mode.startswith("I") or ";16" in held,
        "alpha": mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info,
        "cmyk": mode == "CMYK",
        "grayscale": mode in ("1", "L", "LA", "La") or mode.startswith("I"),
        "palette": mode in ("P", "PA"),
        "other colours": mode in ("LAB", "HSV", "YCbCr"),
    }
    return tuple(kind for kind, there in found.items() if there)


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8: bytes that are no text are shown as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def half(pixels: Tensor) -> Literal["search", "report"]:
    """Which half an image (H, W, 3) belongs to: the parity of its content hash."""
    return "search" if int(image_hash(pixels)[-1], 16) % 2 == 0 else "report"


def _walk(folder: Path) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        for file in files:
            name = (Path(parent) / file).relative_to(folder).as_posix()
            if _is_image(name):
                yield name


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)  # hidden files and macOS's resource forks have image endings but no image
    return path.suffix.lower() in ENDINGS and not any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _stamp(path: Path, name: str) -> list[str | int]:
    try:
        stat = path.stat()
    except OSError:  # a link to nothing: reading it will say so
        return [printable(name), -1, -1]
    return [printable(name), stat.st_size, stat.st_mtime_ns]


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"


def _endings() -> str:
    return ", ".join(sorted(ending[1:] for ending in ENDINGS))
