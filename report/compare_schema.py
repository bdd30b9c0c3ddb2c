"""report.json of `lissom compare`: the single source of its Markdown, HTML and JUnit files."""

from typing import Literal

from pydantic import Field

from ..core.candidate import Data
from ..core.gates import Check, Gate, Verdict
from ..core.measurement import Measurement
from .schema import Ratio

COMPARISON = 1  # schema of report.json


class Side(Data):
    """One of the two evaluations."""

    source: str  # the file, or REV:PATH of a repository
    model: str
    model_hash: str
    pipeline: str
    what: str  # "a plan of 4 steps (999, 749, 499, 249)", "stock schedule of 4 steps", …
    seeds: str  # "report, base 0, images 0 to 1,023"
    samples: int
    denoiser_calls: int
    seconds: float
    environment: dict[str, str] = Field(default_factory=dict)


class Row(Data):
    """One number of both."""

    metric: str
    label: str
    unit: str = ""
    direction: Literal["lower", "higher"]
    base: Measurement | None = None
    candidate: Measurement | None = None
    difference: Ratio | None = None  # candidate - base, with its 95 % interval
    ratio: Ratio | None = None  # candidate / base
    paired: bool = False  # on the same seeds, so that the images' own spread falls out of the difference
    incomparable: str = ""  # why the two may not be compared
    checks: tuple[Check, ...] = ()  # one per limit of the gate; empty where nothing is asked of this number


class Pair(Data):
    """The images of one seed, before and after."""

    index: int  # of the image in its role's block
    caption: str = ""
    base: str  # PNG beside report.json
    candidate: str
    change: float  # root mean squared difference of the pixels, 0..1


class CompareReport(Data):
    """The verdict and all that it rests on."""

    schema_version: int = COMPARISON
    kind: Literal["comparison"] = "comparison"
    lissom: str  # version
    verdict: Verdict
    gates: dict[str, Gate]  # those that were applied
    gates_source: str  # the file, or "none given: zero tolerance for every metric"
    allow_inconclusive: bool = False
    base: Side
    candidate: Side
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...] = ()  # the largest change first
    pairs_missing: str = ""  # why there are none
    command: str  # what makes this report again
    warnings: tuple[str, ...] = ()

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(check for row in self.rows for check in row.checks)

    @property
    def exit_code(self) -> int:
        """0 pass, 3 regression, 4 inconclusive or incomparable (docs/recipes.md)."""
        if self.verdict == "INCONCLUSIVE" and self.allow_inconclusive:
            return 0
        return {"PASS": 0, "REGRESSION": 3, "INCONCLUSIVE": 4, "INCOMPARABLE": 4}[self.verdict]
