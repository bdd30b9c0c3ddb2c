"""Run by path in a fresh process, without lissom: open a saved pipeline, and compare what its denoiser computes.

Reads a job (JSON) from stdin: folder, component, class, dtype, device, trust, variant (of the denoiser's files and of all
components), arguments (see `joined`), probe (a safetensors file of their tensors, and of the expected output, "out"). Prints
one JSON object.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def main() -> None:
    import diffusers
    from safetensors.torch import load_file

    job = json.load(sys.stdin)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    common = {"dtype": getattr(torch, job["dtype"]), "local_files_only": True, "use_safetensors": True}
    trust = {"trust_remote_code": True} if job["trust"] else {}
    own = {"variant": job["variant"]} if job["variant"] else {}
    path = f"{job['folder']}/{job['component']}"  # with `subfolder` AutoModel would look for auto_map in model_index.json only
    if job["trust"]:
        kind = type(diffusers.AutoModel.from_pretrained(path, **common, **own, **trust))  # which cannot tell what it left out
    else:
        kind = getattr(diffusers, job["class"])
    model, info = kind.from_pretrained(path, output_loading_info=True, **common, **own)
    wrong = {
        key: sorted(map(str, info[key]))[:3] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]
    }
    if meta := [n for n, p in model.named_parameters() if p.is_meta]:
        wrong["on meta"] = meta[:3]
    difference, device = (None, "") if wrong else compared(model, job["arguments"], load_file(job["probe"]), job["device"])
    del model
    all_of = {"variant": job["variant_of_all"]} if job["variant_of_all"] else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(job["folder"], **common, **all_of, **trust)
    parameters = sum(p.numel() for p in getattr(pipe, job["component"]).parameters())
    lissom = [name for name in sys.modules if name.partition(".")[0] == "lissom"]
    found = {"wrong": wrong, "difference": difference, "device": device, "parameters": parameters, "lissom": lissom}
    print(json.dumps(found))


def compared(model: Any, arguments: dict[str, Any], held: dict[str, torch.Tensor], device: str) -> tuple[float, str]:
    """How far the model's output is from the expected one, relative to its largest, and the device that it was computed on."""
    expected = held["out"].float()
    try:
        with torch.no_grad(), without_tf32():
            out = model.to(device).eval()(**joined(arguments, held, device), return_dict=False)[0].float().cpu()
    except torch.OutOfMemoryError:  # the model that was cut may still fill the graphics card
        if device == "cpu":
            raise
        return compared(model, arguments, held, "cpu")
    return float((out - expected).abs().max() / expected.abs().max().clamp(min=1e-12)), device


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, float32 is float32 on a graphics card too: convolutions use TF32 unless told, which hides small errors."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def joined(value: dict[str, Any], tensors: dict[str, torch.Tensor], device: str) -> Any:
    """The arguments that JSON and tensors were made of: {"dict": {"a": {"tensor": "0"}, "b": {"plain": 1}}} and so on."""
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held].to(device)
    if kind == "dict":
        return {k: joined(v, tensors, device) for k, v in held.items()}
    if kind in ("list", "tuple"):
        made = [joined(v, tensors, device) for v in held]
        return made if kind == "list" else tuple(made)
    return held


if __name__ == "__main__":
    main()
