"""Statistics built by a test, and what became of them."""

from pathlib import Path
from typing import Any

from lissom.evaluate._statistics import Statistics
from lissom.tests.evaluate.judge import images
from lissom.tests.evaluate.test_images import encode, fill
from lissom.workflow.context import Silent
from lissom.workflow.stats import Build, build
from PIL import Image


class Notes(Silent):
    """A Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.steps: list[bool] = []

    def phase(self, name: str, total: int) -> None:
        self.total = total

    def advance(self, note: str = "", *, fresh: bool = True) -> None:
        self.steps.append(fresh)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def pictures(folder: Path) -> Path:
    """60 images, two of them unreadable, one grey and of another size."""
    made = fill(folder, n=57)
    (made / "003-torn.png").write_bytes(b"")
    (made / "041-torn.png").write_bytes(b"no image")
    (made / "020-grey.png").write_bytes(encode(Image.fromarray(images(1, size=9)[0, :, :, 0].numpy())))
    return made


def built(out: Path, *sources: Path, progress: Notes | None = None, **settings: Any) -> dict[str, Any]:
    return build(Build(sources, out, **{"features": "means", "device": "cpu", **settings}), progress)


def alike(a: Statistics, b: Statistics, tolerance: float) -> bool:
    """All that is known of the images, and their features up to a share of the largest."""
    scale = b.m2.abs().max()
    return (
        a.hash == b.hash
        and a.identity(True) == b.identity(True)
        and a.provenance == b.provenance
        and bool((a.mean - b.mean).abs().max() <= tolerance * b.mean.abs().max())
        and bool((a.m2 - b.m2).abs().max() <= tolerance * scale)
        and bool((a.kept - b.kept).abs().max() <= 2**-10 * b.kept.abs().max())
    )
