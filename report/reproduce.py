"""reproduce.py, a script that makes a plan's images with torch and diffusers alone, and the one-line stock call where one exists."""

import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.candidate import SamplingPlan
from ..core.conditions import IMAGES, NOTES
from ..core.errors import UserError

TEMPLATE = Path(__file__).with_name("reproduce.py.jinja")
KINDS = {
    "DDIMScheduler": "ddim",  # cannot follow a list by itself: its step is written out
    "EulerDiscreteScheduler": "stock",
    "DPMSolverMultistepScheduler": "stock",
    "HeunDiscreteScheduler": "stock",
    "LCMScheduler": "stock",
    "FlowMatchEulerDiscreteScheduler": "flow",  # stock would shift the planned noise levels again
    "FlowMatchHeunDiscreteScheduler": "flow",
    "DEISMultistepScheduler": "levels",  # takes no list: its noise levels are set
    "EulerAncestralDiscreteScheduler": "levels",
    "LMSDiscreteScheduler": "levels",
    "UniPCMultistepScheduler": "levels",
    "PNDMScheduler": "plms",  # steps by a fixed stride: through the table of the planned alphas alone
}
NOISY = ("EulerAncestralDiscreteScheduler", "LCMScheduler")  # draw at every step, and for each image from its own generator
LINES, WIDTH = 99, 120  # of the script: lines, and characters in one
FLAGS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
)  # stock `timesteps=` raises with them
# Classes of layers that the script can leave out, by what stands in for them.
PAIRS = ("FluxSingleTransformerBlock", "FluxTransformerBlock", "JointTransformerBlock")  # both streams as they came
BRANCHES = ("Attention", "FeedForward")  # zeros, or the input where the layer adds that itself
BLOCKS = ("BasicTransformerBlock", "SanaTransformerBlock", "WanTransformerBlock")  # the input
MIDDLES = ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn")  # the input
KNOWN = {*PAIRS, *BRANCHES, *BLOCKS, *MIDDLES, "ResnetBlock2D", "Transformer2DModel"}


@dataclass(frozen=True)
class ModelCall:
    """What is called, and with what: everything of a run besides its plan."""

    pipeline: str  # class name in diffusers
    reference: str  # what from_pretrained opens: a folder or a hub id (without revision)
    seeds: tuple[int, ...]  # of the starting noise, one per image
    rows: tuple[Mapping[str, Any], ...] = ({},)  # call arguments of one image each; image i takes row i mod len(rows)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # call arguments of all images: guidance_scale, ...
    layers: Mapping[str, str] = field(
        default_factory=dict
    )  # class names of the layers that the plan leaves out (`layer_classes`)
    denoiser: str = "unet"  # component that holds these layers
    revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    models: Mapping[str, str] = field(default_factory=dict)  # what from_pretrained opens for the plan's other models, by name


def layer_classes(denoiser: Any, plan: SamplingPlan) -> dict[str, str]:
    """Address -> class name of every layer that the plan skips or reuses somewhere. `denoiser`: the nn.Module."""
    return {a: type(denoiser.get_submodule(a)).__name__ for a in (*_named(plan, "skip"), *_named(plan, "reuse"))}


def emit(plan: SamplingPlan, model: ModelCall, images: int = 16) -> str:
    """The text of reproduce.py: the images of a run along `plan`, to 1e-4 in float32.

    It draws the first `images` seeds, or as many of them as keep it under 100 lines.
    Raises UserError, saying what stands in the way, where a short script cannot give the same images: other schedulers,
    noise that the pipeline does not draw from each image's generator, call arguments that are not plain values.
    """
    if reason := _obstacle(plan, model):
        raise UserError(f"no reproduce.py for this plan: {reason}. `lissom sample --plan plan.json` makes its images.")
    count = min(images, len(model.seeds))
    while (text := _render(plan, model, count)).count("\n") > LINES and count > 1:
        count -= 1
    return text


def stock_call(plan: SamplingPlan, pipeline_class: str, arguments: Mapping[str, Any] | None = None) -> str | None:
    """Python that makes the plan's images with a stock scheduler of diffusers, `pipe` and `prompt` given. None if there is none.

    A call exists for pipelines with an argument `timesteps` (flow matching: `sigmas`), for plans of one model that execute all layers and have no
    noise levels of their own, with solvers that take a list and draw no noise. DDIM takes none; DPM-Solver++ of order 1 is the same update (Lu et al. 2022, sec. 4.1) and does.
    """
    config, name = plan.scheduler.config, plan.scheduler.name
    accepted = inspect.signature(_pipeline(pipeline_class).__call__).parameters if _pipeline(pipeline_class) else {}
    flow = KINDS.get(name) == "flow"
    if (
        any(step.left_out or step.model or step.sigma is not None for step in plan.steps)
        or ("sigmas" if flow else "timesteps") not in accepted
    ):
        return None
    takes = KINDS.get(name) in ("ddim", "stock") or name == "FlowMatchEulerDiscreteScheduler"
    if not takes or name in NOISY or _scheduler_obstacle(plan):
        return None
    changes: dict[str, Any]
    if name == "DDIMScheduler":
        if any(config.get(key, default) for key, default in (("clip_sample", True), ("thresholding", False))):
            return None  # the two solvers differ once x0 is changed between them
        if config.get("rescale_betas_zero_snr") or config.get("prediction_type", "epsilon") == "sample":
            return None  # no finite sigma at the start; untested
        name = "DPMSolverMultistepScheduler"
        last = "zero" if config.get("set_alpha_to_one", True) else "sigma_min"
        changes = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": last}
    elif flow:
        changes = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None} | {flag: False for flag in FLAGS[:3]}
    else:
        changes = {flag: False for flag in FLAGS if config.get(flag)}
    given = [f"{key}={_literal(value)}" for key, value in (arguments or {}).items()]
    total = config.get("num_train_timesteps", 1000)
    listed = [repr(t / total) for t in plan.timesteps] if flow else [_number(t) for t in plan.timesteps]
    call = ["prompt" if "prompt" in accepted else "", *given, f"{'sigmas' if flow else 'timesteps'}=[{', '.join(listed)}]"]
    made = ", ".join(["pipe.scheduler.config", *(f"{key}={_literal(value)}" for key, value in changes.items())])
    return (
        f"from diffusers import {name}\n\n"
        f"pipe.scheduler = {name}.from_config({made})\n"
        f"images = pipe({', '.join(part for part in call if part)}).images\n"
    )


def _render(plan: SamplingPlan, model: ModelCall, count: int) -> str:
    from jinja2 import Environment, StrictUndefined

    from ..core.driving.run import intervals
    from ..core.driving.schedulers import TWICE, entries

    config, name = plan.scheduler.config, plan.scheduler.name
    kind = KINDS[name]
    # Pipelines want one text per image in every text argument once `prompt` is a list.
    texts = {key: value for key, value in model.arguments.items() if "prompt" in key and isinstance(value, str)}
    shared = {key: value for key, value in model.arguments.items() if key not in texts}
    drawn = [(seed, texts | _row(model.rows[i % len(model.rows)])) for i, seed in enumerate(model.seeds[:count])]
    # Which planned timestep each call is made at, and which step it belongs to: Heun and PLMS call twice in some.
    order = entries(name, len(plan.steps))
    steps = [plan.steps[i] for i in intervals(order)]
    skips, reuses = (
        {a: [i for i, step in enumerate(steps) if a in getattr(step, way)] for a in _named(plan, way)}
        for way in ("skip", "reuse")
    )
    classes = {model.layers[a] for a in (*skips, *reuses)}
    used = classes & KNOWN
    columns = next(c for c in range(min(8, count), 0, -1) if count % c == 0)  # make_image_grid wants full rows
    has_class = _pipeline(model.pipeline) is not None
    # Named always: transformers opens a text encoder in the dtype it was saved in.
    load = [
        "args.model",
        *([f"revision={_literal(model.revision)}"] if model.revision else []),
        f"torch_dtype=torch.{model.dtype}",
    ]
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        wrap=_wrap,
        kind=kind,
        scheduler=name,
        config=[f"{_literal(key)}: {_literal(value)}" for key, value in _changed(name, config).items()],
        prediction=config.get("prediction_type", "epsilon"),
        thresholding=config.get("thresholding", False),
        clip=config.get("clip_sample", True),
        times=[_number(t) for t in plan.timesteps],
        sigmas=[repr(plan.steps[i].sigma) for i in order] if plan.steps[0].sigma is not None else [],
        models=[
            f"({_literal(model.models[n])}, {_calls([i for i, step in enumerate(steps) if step.model == n])})"
            for n in plan.models
        ],
        twice=name in TWICE,
        counted="steps" if len(order) == len(plan.steps) else "calls of `step`",
        skips=[f"{_literal(address)}: {_calls(calls)}" for address, calls in skips.items()],
        # Where a layer is reused, one list says of all layers both.
        reuses=[f"{_literal(a)}: ({_calls(skips.get(a, []))}, {_calls(reuses.get(a, []))})" for a in sorted({*skips, *reuses})]
        if reuses
        else [],
        stages=_literal(tuple(sorted(classes - KNOWN))) if classes - KNOWN else "",
        plus="lambda x, y: x if x is None else x + y" if used.intersection(PAIRS) else "torch.add",
        minus="lambda x, y: x if x is None else x - y" if used.intersection(PAIRS) else "torch.sub",
        used=used,
        pairs=_literal(tuple(cls for cls in PAIRS if cls in used)) if used.intersection(PAIRS) else "",
        branches=_literal(tuple(cls for cls in BRANCHES if cls in used)) if used.intersection(BRANCHES) else "",
        denoiser=model.denoiser,
        images=[_literal(entry) for entry in drawn],
        unconditional=not drawn[0][1],
        call=_literal(shared),
        pipeline=model.pipeline if has_class else "DiffusionPipeline",
        load=", ".join(load + ["trust_remote_code=True"] * model.trust_remote_code),
        load_other=", ".join(["reference", load[-1]] + ["trust_remote_code=True"] * model.trust_remote_code),
        model=_literal(model.reference),
        device=_literal(model.device),
        imports=sorted(
            {name, model.pipeline if has_class else "DiffusionPipeline", *["DiffusionPipeline"] * bool(plan.models)}
        ),
        rows=count // columns,
        columns=columns,
    )


def _obstacle(plan: SamplingPlan, model: ModelCall) -> str | None:
    """Why no short script can follow this plan; None if one can."""
    if reason := _scheduler_obstacle(plan):
        return reason
    if model.arguments.get("eta"):
        return f"eta = {model.arguments['eta']} draws noise at every step"
    if plan.scheduler.name in NOISY and not hasattr(_pipeline(model.pipeline), "prepare_extra_step_kwargs"):
        return f"{plan.scheduler.name} draws noise at every step, for which {model.pipeline} hands on no generators"
    if any(key in row for row in model.rows for key in IMAGES) or hasattr(_pipeline(model.pipeline), "get_timesteps"):
        return "it starts from input images"
    for key, value in (*model.arguments.items(), *(item for row in model.rows for item in row.items())):
        if not _plain(value):
            return f"the call argument {key!r} is not a plain value (text, number, true, false, or a list of them)"
    if unknown := [name for name in plan.models if name not in model.models]:
        return f"where its model {unknown[0]} is kept is not known"
    for way in ("skip", "reuse"):
        for address in _named(plan, way):
            found = model.layers.get(address)
            stage = way == "reuse" and found is not None and address.rpartition(".")[0] in ("down_blocks", "up_blocks")
            if found not in KNOWN and not stage:
                return f"it {way}s {address}, whose class ({found or 'not given'}) it does not know"
    return None


def _scheduler_obstacle(plan: SamplingPlan) -> str | None:
    from ..core.driving.schedulers import misfit

    config, name = plan.scheduler.config, plan.scheduler.name
    if name not in KINDS:
        return f"it is written for {', '.join(KINDS)}, not for {name}"
    if reason := misfit(name, dict(config)):
        return f"{name} cannot follow it ({reason})"
    if str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling"):
        return f"{name} draws noise at every step"
    if len({step.sigma is None for step in plan.steps}) > 1:
        return "only some of its steps name a noise level"
    for flag in ("use_flow_sigmas", "invert_sigmas"):
        if config.get(flag):
            return f"it does not know {name} with {flag}"
    return None


def _pipeline(name: str) -> Any:
    """The class of a pipeline, None if diffusers has none of that name (a pipeline with its own code)."""
    import diffusers

    return getattr(diffusers, name, None)


def _changed(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's arguments that differ from its defaults; sigma schedules other than the plan's are left off."""
    import diffusers

    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    kept = {key: value for key, value in config.items() if key in known and key not in FLAGS and value != known[key].default}
    return {key: value for key, value in kept.items() if value is not None or known[key].default is None}


def _named(plan: SamplingPlan, way: Literal["skip", "reuse"]) -> list[str]:
    return sorted({address for step in plan.steps for address in getattr(step, way)})


def _calls(numbers: list[int]) -> str:
    """
    >>> _calls([0, 1, 2, 5]), _calls([1, 3, 5, 7, 9])
    ('[0, 1, 2, 5]', 'range(1, 10, 2)')
    """
    stride = numbers[1] - numbers[0] if len(numbers) > 4 else 0
    if not stride or numbers != [*range(numbers[0], numbers[-1] + 1, stride)]:
        return repr(numbers)
    return f"range({numbers[0]}, {numbers[-1] + 1}{f', {stride}' if stride > 1 else ''})"


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in NOTES}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _literal(value: Any) -> str:
    """A Python literal with double quotes, as formatters write it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # every JSON string is a Python string
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_literal, value)) + ("," if len(value) == 1 else "") + ")"
    return "[" + ", ".join(map(_literal, value)) + "]" if isinstance(value, list) else repr(value)


def _wrap(head: str, items: Iterable[str], tail: str) -> str:
    """A list or dict literal on one line if it fits, else on as few lines as it takes."""
    entries = list(items)
    line = head + ", ".join(entries) + tail
    if len(line) <= WIDTH:
        return line
    glue = "\0"  # a line may break between entries only
    text = " ".join(entry.replace(" ", glue) + "," for entry in entries)
    body = textwrap.wrap(text, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return "\n".join([head, *("    " + row.replace(glue, " ") for row in body), tail])
