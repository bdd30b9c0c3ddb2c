"""Output losses of cuts on recorded calls, kept on disk as they are measured: kill -9 loses those of one recorded call."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import memory
from ..core.candidate import Cut, canonical
from ..core.errors import SamplingError, UserError
from ._scores import Scores

if TYPE_CHECKING:
    from ..core.calibration import Inputs


class Losses:
    """E|eps(cut) - eps|^2 per element over all recorded calls; asked twice, answered from the file."""

    what = "E |eps(pruned) - eps|^2 per element on the calibration calls"

    def __init__(self, pipe: Any, inputs: "Sequence[Inputs]", path: Path, identity: str, progress: Any) -> None:
        """identity: of everything that the losses depend on beside the call and the cuts. UserError where the file has another."""
        from ..core.driving.steering import denoisers

        self.denoisers = denoisers(pipe)
        first = next(iter(self.denoisers))  # of two, the second takes over at low noise and is not cut
        self.inputs = [call for call in inputs if call.name == first]
        if not self.inputs:
            raise UserError(
                f"none of the {len(inputs)} recorded calls is of the {first}. Record more: raise times and calibration."
            )
        self.progress = progress
        self.cuts_scored = 0  # in this session, over all calls
        self.seconds = self.whole_seconds = 0.0  # spent on them; what as many forwards of the whole denoiser take
        self._scores = Scores(path, identity)

    def __call__(self, options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """The loss of every option, each alone against the whole model."""
        names = [canonical([cut.plain() for cut in cuts]) for cuts in options]
        self.progress.phase(f"losses of {len(options)} cuts", len(self.inputs))
        for call in self.inputs:
            own = _name(call)
            missing = [i for i, name in enumerate(names) if options[i] and (own, name) not in self._scores.known]
            if missing:
                found = self._measured(call, [options[i] for i in missing])
                self.cuts_scored += len(missing)
                self._scores.add([(own, names[i]) for i in missing], found)
            self.progress.advance(fresh=bool(missing))
        return [self._mean(name) if options[i] else 0.0 for i, name in enumerate(names)]

    def run(self) -> None:
        """Run the denoiser on all recorded calls: for methods that watch it."""
        import torch

        denoiser = next(iter(self.denoisers.values()))
        with torch.no_grad():
            for call in self.inputs:
                denoiser(**call.kwargs)

    def facts(self) -> dict[str, object]:
        """What the losses were measured on, for the report."""
        images = sum(len(call.images) for call in self.inputs)
        levels = ", ".join(f"{t:g}" for t in sorted({call.timestep for call in self.inputs}, reverse=True))
        return {"images": images, "timesteps": levels}

    def spent(self) -> dict[str, float]:
        """Of this session: what was found in the folder took nothing."""
        if not self.cuts_scored:
            return {}
        return {
            "losses_measured": float(self.cuts_scored),
            "seconds_for_losses": self.seconds,
            "forwards_per_loss": self.seconds / max(self.whole_seconds, 1e-9),
        }

    def _measured(self, call: "Inputs", options: Sequence[tuple[Cut, ...]]) -> list[float]:
        """On one call; on halves of it where memory runs out."""
        from ..core.output_loss import OutputLoss

        measured = OutputLoss(self.denoisers, [call])
        try:
            found = measured.each(options)
        except RuntimeError as e:
            if not memory.ran_out(e):
                raise
            found = []
        if not found:  # only after the frame whose traceback holds the tensors is gone
            if call.rows == 1:
                raise SamplingError(
                    "out of memory while losses are measured on a single image. Use half precision, a smaller image or a larger device."
                )
            middle = call.rows // 2
            one, two = (self._measured(call.part(*rows), options) for rows in ((0, middle), (middle, call.rows)))
            return [(a * middle + b * (call.rows - middle)) / call.rows for a, b in zip(one, two, strict=True)]
        self.seconds += measured.seconds
        self.whole_seconds += measured.whole_seconds
        return found

    def _mean(self, name: str) -> float:
        return sum(self._scores.known[_name(c), name] * c.rows for c in self.inputs) / sum(c.rows for c in self.inputs)


def _name(call: "Inputs") -> str:
    """What tells a call from another of the same model and seed. Where memory ran out, a block of images was split."""
    return f"{call.images.start}-{call.images.stop} at {call.timestep:.10g}"
