"""The JSON of `lissom evaluate`: what `lissom compare` reads, and what a repository may keep as a baseline."""

import json
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from ..core.candidate import Data, SamplingPlan, Seeds
from ..core.errors import UserError, one_line
from ..core.measurement import Measurement

EVALUATION = 1  # schema of the file; raised when a field changes its meaning, added fields do not raise it


class Power(Data):
    """How many images, on each side, would show a difference of this size."""

    metric: str
    difference: float
    images: int  # with other seeds on the two sides: 95 % intervals, seen four times in five


class Evaluation(Data):
    """One model, with its plan, measured."""

    schema_version: int = EVALUATION
    kind: Literal["evaluation"] = "evaluation"
    identity: dict[str, Any] = Field(default_factory=dict)  # all that decides the result: an equal one is not measured again
    lissom: str  # version
    model: str  # reference, with the pinned revision
    model_hash: str
    pipeline: str  # class name
    plan: SamplingPlan | None = None
    steps: int | None = None
    what: str  # "a plan of 4 steps (…)", "stock schedule of 4 steps"
    samples: int  # images
    seeds: Seeds | None = None  # None where no metric looks at images
    measurements: tuple[Measurement, ...]
    base: str = ""  # the uncut model that fidelity is measured against
    images: str | None = None  # folder beside this file: the first images as PNG, per-image.jsonl
    power: tuple[Power, ...] = ()
    denoiser_calls: int = 0  # for the images, over all sessions; those of references, the base and timings left out
    seconds: float = 0.0  # for the images and what was seen of them
    environment: dict[str, str] = Field(default_factory=dict)
    command: str = ""
    warnings: tuple[str, ...] = ()

    def measured(self, metric: str) -> Measurement | None:
        return next((m for m in self.measurements if m.metric == metric), None)

    def text(self) -> str:
        """The file: defaults left out of measurements, the printed label added for whoever reads it with jq."""
        plain = self.plain() | {"schema_version": self.schema_version, "kind": self.kind}
        plain["measurements"] = [m.plain() | {"label": m.label} for m in self.measurements]
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Read what `text` wrote. Raises UserError, naming `where`, for anything else and for a newer schema."""
        try:
            raw = json.loads(text)
            json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair could be read, but never written again
        except (ValueError, RecursionError) as e:
            raise UserError(
                f"{where}: not JSON ({one_line(e)}). Give the file that `lissom evaluate --out FILE.json` wrote."
            ) from e
        if not isinstance(raw, dict) or raw.get("kind") != "evaluation":
            kind = raw.get("kind", "no report of lissom") if isinstance(raw, dict) else f"a {type(raw).__name__}"
            raise UserError(
                f"{where}: is {kind}, not an evaluation. Give the file that `lissom evaluate --out FILE.json` wrote."
            )
        if (schema := raw.get("schema_version")) != EVALUATION:
            newer = isinstance(schema, int) and schema > EVALUATION
            raise UserError(
                f"{where}: written in schema {schema} by lissom {raw.get('lissom', '?')}, this one reads {EVALUATION}. "
                + ("Update lissom here." if newer else "Measure the model again.")
            )
        try:
            found = cls.model_validate(_without_labels(raw))
            for m in found.measurements:
                m.interval()
        except ValidationError as e:
            first = e.errors()[0]
            raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Measure the model again.") from e
        except OverflowError as e:
            raise UserError(f"{where}: its numbers are too large to be true. Measure the model again.") from e
        if found.images is not None and PurePath(found.images).name != found.images:
            raise UserError(f"{where}: images {found.images!r} is no folder beside it. Measure the model again.")
        return found


def _without_labels(raw: dict[str, Any]) -> dict[str, Any]:
    """Labels follow from the rest; they are for people."""
    listed = raw.get("measurements")
    if not isinstance(listed, list):
        return raw
    return raw | {"measurements": [{k: v for k, v in m.items() if k != "label"} if isinstance(m, dict) else m for m in listed]}
