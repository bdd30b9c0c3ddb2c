"""Output losses of cuts on recorded calls, kept on disk as they are measured: kill -9 loses those of one recorded call."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.candidate import Cut, canonical
from ..core.files import disk_errors

if TYPE_CHECKING:
    from ..core.calibration import Inputs


class Losses:
    """E|eps(cut) - eps|^2 per element over all recorded calls; asked twice, answered from the file."""

    def __init__(self, pipe: Any, inputs: "Sequence[Inputs]", path: Path, identity: str, progress: Any) -> None:
        """identity: of everything that the losses depend on; a file of another one is begun anew."""
        self.pipe, self.inputs, self.path, self.progress = pipe, inputs, path, progress
        self.cuts_scored = 0  # in this session, over all calls
        self.seconds = self.whole_seconds = 0.0  # spent on them; what as many forwards of the whole denoiser take
        self._known: dict[tuple[int, str], float] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        if lines and lines[0] == canonical({"identity": identity}):
            for line in lines[1:]:
                try:
                    call, cuts, loss = json.loads(line)
                except ValueError:  # torn by kill -9
                    break
                self._known[call, cuts] = loss
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [canonical({"identity": identity}), *(json.dumps([*key, loss]) for key, loss in self._known.items())]
            path.write_text("\n".join(kept) + "\n", encoding="utf-8")

    def __call__(self, options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """The loss of every option, each alone against the whole model."""
        from torch import OutOfMemoryError

        from ..core.driving.steering import denoisers
        from ..core.errors import SamplingError
        from ..core.output_loss import OutputLoss

        names = [canonical([cut.plain() for cut in cuts]) for cuts in options]
        self.progress.phase(f"losses of {len(options)} cuts", len(self.inputs))
        for number, call in enumerate(self.inputs):
            missing = [i for i, name in enumerate(names) if options[i] and (number, name) not in self._known]
            if missing:
                measured = OutputLoss(denoisers(self.pipe), [call])
                try:
                    found = measured.each([options[i] for i in missing])
                except OutOfMemoryError as e:
                    raise SamplingError(
                        f"out of memory while losses are measured on {len(call.images)} images at once. Lower --calibration, "
                        "or raise the number of calls (--set times=32)."
                    ) from e
                self.cuts_scored += len(missing)
                self.seconds += measured.seconds
                self.whole_seconds += measured.whole_seconds
                lines = []
                for i, loss in zip(missing, found, strict=True):
                    self._known[number, names[i]] = loss
                    lines.append(json.dumps([number, names[i], loss]) + "\n")
                with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            self.progress.advance(fresh=bool(missing))
        rows = [call.rows for call in self.inputs]
        return [self._mean(name, rows) if options[i] else 0.0 for i, name in enumerate(names)]

    def _mean(self, name: str, rows: Sequence[int]) -> float:
        return sum(self._known[i, name] * n for i, n in enumerate(rows)) / sum(rows)
