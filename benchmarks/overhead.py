"""What following a plan costs over a bare loop: `python -m lissom.benchmarks.overhead` (about two minutes on two slow cores).

Time to the final latents of 256 images, 4 DDIM steps, in chunks of 64: lissom's Sampler (no memo) against a loop that does
nothing but the same denoiser forwards and stock scheduler steps. The two take turns, so that a machine whose speed drifts
slows both; what is reported is the ratio within each turn. VAE decode and features are listed apart.
"""

import statistics
import time
from collections.abc import Callable

import torch

from ..core import models
from ..core.candidate import Seeds
from ..core.sampling import Sampler
from ..core.spacing import fixed
from ..evaluate import _features
from . import _results

IMAGES, CHUNK, STEPS, TURNS = 256, 64, 4, 7


def main() -> None:
    model = models.load("zoo:fashion", device="cpu")
    pipe, conditions = model.pipe, model.conditions
    assert conditions is not None
    plan = fixed(pipe.scheduler, STEPS)["leading"]  # the one spacing that stock DDIM follows too
    seeds = Seeds(role="report", base=0, count=IMAGES)
    sampler = Sampler(pipe, conditions, chunk=CHUNK, call={"guidance_scale": 1.0})
    made: dict[str, torch.Tensor] = {}

    def followed() -> None:
        made["follow"] = torch.cat([b.latents for b in sampler.images(plan, seeds, output="latents") if b.latents is not None])

    @torch.no_grad()
    def bare() -> None:
        parts = []
        for start in range(0, IMAGES, CHUNK):
            indices = range(start, start + CHUNK)
            prompts = [str(conditions.row(i)["prompt"]) for i in indices]
            text, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
            x = torch.stack(
                [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in values[start : start + CHUNK]]
            )
            pipe.scheduler.set_timesteps(STEPS)
            for t in pipe.scheduler.timesteps:
                noise = pipe.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
                x = pipe.scheduler.step(noise, t, x, return_dict=False)[0]
            parts.append(x)
        made["bare"] = torch.cat(parts)

    values = seeds.values()
    pairs = [(_seconds(followed), _seconds(bare)) for _ in range(TURNS + 1)][1:]  # the first turn warms up
    difference = (made["follow"] - made["bare"]).abs().max().item()
    ratios = sorted(a / b for a, b in pairs)
    judge = _features.load("zoo:judge")
    pixels = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        latents = made["bare"] / pipe.vae.config.scaling_factor
        decode = [_seconds(lambda: [pipe.vae.decode(z) for z in latents.split(CHUNK)]) for _ in range(TURNS)]
    features = [_seconds(lambda: judge.extract(pixels)) for _ in range(TURNS)]
    loop = statistics.median(b for _, b in pairs)
    rows = [
        ["follow / bare loop", f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f} to {ratios[-1]:.3f}"],
        ["VAE decode / bare loop", f"{statistics.median(decode) / loop:.3f}", _spread(decode, loop)],
        ["judge's features / bare loop", f"{statistics.median(features) / loop:.3f}", _spread(features, loop)],
    ]
    _results.write(
        "overhead",
        f"{IMAGES} images of `zoo:fashion` to final latents, {STEPS} DDIM steps, chunks of {CHUNK}, no memo; {TURNS} turns; "
        f"{_results.machine()}. Largest difference of the latents: {difference:.1e}.\n\n"
        + _results.table(["time ratio", "median", "range"], rows),
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _spread(values: list[float], by: float) -> str:
    return f"{min(values) / by:.3f} to {max(values) / by:.3f}"


if __name__ == "__main__":
    main()
