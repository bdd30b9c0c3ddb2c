"""What pruning takes: `python -m lissom.benchmarks.prune_cost` (a quarter of an hour on two slow cores, 10 GB of disk).

How much of a whole forward the score of one layer costs, by time on the embedded models and by operations at full size; how far a
saved model's outputs are from those in memory; time and memory to prune a model of SDXL's size, whose weights are random.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..core import anatomy, blueprints, calibration, models
from ..core.calibration import Inputs
from ..core.candidate import Cut
from ..core.driving.steering import denoisers
from ..core.output_loss import OutputLoss
from ..core.sampling import Sampler
from . import _results

TURNS = 5
UNITS = ("resnet", "attention", "transformer_block")
FULL_SIZE = ("sd15", "sdxl", "dit-xl", "pixart", "sd3", "flux")
SAVED: list[tuple[str, list[str]]] = [  # (model, arguments of `lissom prune`)
    ("zoo:fashion", ["laptop", "zoo:fashion", "--keep", "0.7"]),
    ("zoo:fashion, plain", ["laptop", "zoo:fashion", "--keep", "0.7", "--require-plain-load"]),
    ("zoo:fashion, bk-base", ["slim_unet", "zoo:fashion", "--set", "layers_per_block=1"]),
    ("zoo:fashion-dit", ["laptop", "zoo:fashion-dit", "--keep", "0.67"]),
    ("zoo:fashion-dit, saved in float16", ["laptop", "zoo:fashion-dit", "--keep", "0.67", "--save-dtype", "float16"]),
]
LARGE: list[tuple[str, list[str]]] = [
    ("magnitude, plain, keep 0.5", ["magnitude", "{}", "--keep", "0.5", "--require-plain-load"]),
    ("koala-700m", ["slim_unet", "{}", "--set", "preset=koala-700m"]),
]


def singles(denoiser: Any) -> list[list[Cut]]:
    """Every layer that laptop scores by default, alone."""
    found = [x.address for x in anatomy.layers(denoiser) if x.kind in UNITS]
    several = {a.rpartition(".transformer_blocks.")[0] for a in found if a.endswith(".transformer_blocks.1")}
    found = [a for a in found if a not in several]
    return [[Cut(address=a, what="remove")] for a in found if not any(a.startswith(b + ".") for b in found)]


def by_time(ref: str, batch: int) -> list[list[float]]:
    """Ratios of time to as many whole forwards, in turns: of the scores alone, and with all that scoring a call takes."""
    model = models.load(ref, device="cpu")
    sampler = Sampler(model.pipe, model.conditions, chunk=batch, call={"guidance_scale": 1.0})  # type: ignore[arg-type]
    (call,) = calibration.record(sampler, batch, 1, 0)
    options, alone, all_in = singles(model.denoiser), [], []
    for _ in range(TURNS):
        fast, began = OutputLoss(denoisers(model.pipe), [call]), time.perf_counter()
        fast.each(options)
        took = time.perf_counter() - began
        plain = OutputLoss(denoisers(model.pipe), [call], reuse=False)
        plain.each(options)
        alone.append(fast.seconds / plain.seconds)
        all_in.append(took / plain.seconds)
    return [alone, all_in]


def by_operations(name: str) -> tuple[int, float]:
    """(layers, operations of one score as a share of one forward) of a structure, on the meta device."""
    blueprint = blueprints.load(name)
    call, found = (
        Inputs(blueprint.component, blueprint.example(), 1, range(1), 500.0),
        {blueprint.component: blueprint.denoiser},
    )
    options = singles(blueprint.denoiser)

    def operations(reuse: bool, given: Sequence[Sequence[Cut]]) -> int:
        with FlopCounterMode(display=False) as counter:
            for _ in OutputLoss(found, [call], reuse=reuse).outputs(call, given):
                pass
        return counter.get_total_flops()

    each = (operations(True, options) - operations(True, [])) / len(options)
    return len(options), each / operations(False, [])


def prune(arguments: Sequence[str], out: Path) -> tuple[dict[str, Any], float, float]:
    """(report, seconds, peak of private memory of the process and its children in GB) of a `lissom prune`."""
    words = [*arguments, "--out", str(out), "--no-measure", "--set", "latency_batches=[]", "--device", "cpu", "--json", "-q"]
    began, peak = time.monotonic(), 0
    with (out.parent / f"{out.name}.json").open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "lissom", "prune", *words], stdout=file)
        while process.poll() is None:
            peak = max(peak, _private(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"lissom prune {' '.join(words)} ended with {process.returncode}")
    return json.loads((out.parent / f"{out.name}.json").read_text()), time.monotonic() - began, peak / 1e9


def _private(pid: int) -> int:
    """Bytes of anonymous memory of a process and all below it: mapped files are the disk's."""
    import psutil

    total = 0
    try:
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
    except (psutil.Error, OSError, StopIteration):
        pass
    return total


def large(folder: Path) -> Path:
    """A pipeline of SDXL's classes and sizes: the U-Net's weights are random, in float16; its other parts are small."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    blueprint = blueprints.load("sdxl")
    denoiser: Any = blueprint.denoiser
    tokenizer = CLIPTokenizer.from_pretrained(models.ZOO / "fashion" / "tokenizer")
    shared = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 77}
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=8, down_block_types=("DownEncoderBlock2D",) * 4,
                             up_block_types=("UpDecoderBlock2D",) * 4),
        "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12, **shared)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, projection_dim=1280, num_attention_heads=20, **shared)),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
    }  # fmt: skip
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    (folder / "unet").mkdir()
    denoiser.save_config(folder / "unet")
    index: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    shapes: list[tuple[str, torch.Tensor]] = list(denoiser.state_dict().items())
    for number, (key, like) in enumerate(shapes):
        held[key] = torch.randn(like.shape, dtype=torch.float16) * (0.02 if like.ndim > 1 else 0.0)
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm3.weight", "norm_out.weight")):
            held[key] = torch.ones(like.shape, dtype=torch.float16)
        if sum(t.numel() for t in held.values()) > 2.5e8 or number == len(shapes) - 1:
            index |= dict.fromkeys(held, name := f"diffusion_pytorch_model-{number:05}.safetensors")
            save_file(held, folder / "unet" / name, metadata={"format": "pt"})
            held = {}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2 * sum(v.numel() for _, v in shapes)}, "weight_map": index})
    )
    classes: dict[str, Any] = {
        name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()
    }
    none = {"image_encoder": [None, None], "feature_extractor": [None, None]}
    pipeline = {
        "_class_name": blueprint.pipeline,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "force_zeros_for_empty_prompt": True,
    }
    (folder / "model_index.json").write_text(json.dumps({**pipeline, **classes, **none}, indent=2))
    return folder


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    scores = [
        [ref, f"batch {batch}", *(f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in by_time(ref, batch))]
        for ref in ("zoo:fashion", "zoo:fashion-dit")
        for batch in (8, 64)
    ]
    counts = [(name, *by_operations(name)) for name in FULL_SIZE]
    with tempfile.TemporaryDirectory() as scratch:
        saved = []
        for number, (name, arguments) in enumerate(SAVED):
            report, seconds, _ = prune(arguments, Path(scratch) / str(number))
            how = "plain" if report["opens_plain"] else "remote code"
            saved.append([name, how, str(len(report["cuts"])), f"{report['reload_difference']:.1e}", f"{seconds:.0f} s"])
        model = large(Path(scratch) / "sdxl")
        size = sum(f.stat().st_size for f in (model / "unet").iterdir()) / 1e9
        big = []
        for number, (name, arguments) in enumerate(LARGE):
            out = Path(scratch) / f"large-{number}"
            report, seconds, peak = prune([a.format(model) for a in arguments], out)
            big.append(
                [name, f"{report['after']['params']:,}", "plain" if report["opens_plain"] else "remote code"]
                + [f"{report['reload_difference']:.1e}", f"{seconds / 60:.1f} min", f"{peak:.1f} GB"]
            )
            shutil.rmtree(out)
    time_note = (
        f"Time of scoring one layer over one forward of the whole denoiser, all layers of `laptop`'s default units, {TURNS} turns, median and range; "
        f"{_results.machine()}. Asked: at most 0.65. The second column also holds the whole forward that all scores of a call share."
    )
    by_count = ", ".join(f"{name} {share:.2f} ({count} layers)" for name, count, share in counts)
    saved_note = (
        "Saved, and opened in a fresh process; the largest difference of outputs over their largest value (float32; whole commands, "
        "with scoring, without images):"
    )
    large_note = (
        f"A pipeline of SDXL's size with random weights ({size:.1f} GB of float16, computed in float32). Memory is private, of the "
        "command and its fresh process together; the U-Net alone takes 10.3 GB."
    )
    text = [
        time_note,
        _results.table(["model", "images", "a score", "with the shared forward and the losses"], scores),
        f"By operations, batch 1, on the meta device: {by_count}.",
        saved_note,
        _results.table(["model", "opens", "cuts", "difference", "took"], saved),
        large_note,
        _results.table(["method", "parameters", "opens", "difference", "took", "peak memory"], big),
    ]
    _results.write("prune_cost", "\n\n".join(text))


if __name__ == "__main__":
    main()
