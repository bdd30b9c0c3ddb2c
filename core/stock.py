"""Whether a config of the stock diffusers class can express a cut denoiser, and under which names its weights then go.

A stock result needs no code of ours: it opens by `DiffusionPipeline.from_pretrained` everywhere. The answer is never guessed:
the smaller model is built from the new config (on meta) and its names and shapes are compared with what the cuts leave.
"""

import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .anatomy import uncompiled
from .artifact import renamed
from .errors import UserError
from .experts import Experts
from .standins import Absent

# Classes known to run with none of their blocks left; a DiT's output layer reads its first one.
WITHOUT_BLOCKS = ("FluxTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")


@dataclass(frozen=True)
class Part:
    """Where a tensor of the smaller model comes from."""

    key: str | None  # name in the cut denoiser; None: zeros
    rows: tuple[tuple[int, int], ...] = ()  # if given: these ranges of its first dimension, one after the other


@dataclass(frozen=True)
class Stock:
    """A cut denoiser as its stock class sees it."""

    cls: type  # of diffusers
    config: dict[str, Any]  # for `cls.from_config`
    parts: dict[str, Part]  # name in the stock model -> source
    modules: dict[str, str]  # address in the cut denoiser -> address in the stock model, of modules that moved
    model: Any  # as it is built from `config`, on meta


def base_class(denoiser: nn.Module) -> Any:
    """The diffusers class of a denoiser, whatever class of ours steers it or carries cuts. UserError for anyone else's class."""
    ours = __name__.partition(".")[0]
    lineage: list[Any] = [c for c in type(denoiser).__mro__ if c.__module__.partition(".")[0] != ours]
    first = lineage[0]
    if not first.__module__.startswith("diffusers.models."):
        raise UserError(
            f"{first.__name__}: the denoiser's class is not one of diffusers, so that it cannot be saved with cuts."
        )
    # A steered denoiser's class goes by the name of the one below it.
    return [c for c in lineage if (c.__module__, c.__qualname__) == (first.__module__, first.__qualname__)][-1]


def base_config(denoiser: Any) -> dict[str, Any]:
    """The config that the diffusers class of a denoiser was built from."""
    config = {k: v for k, v in dict(denoiser.config).items() if not k.startswith("_") and k not in ("cuts", "auto_map")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def express(denoiser: nn.Module) -> Stock | str:
    """The stock config and the weights' names of a denoiser that holds stand-ins; a reason where there is no such config.

    Exact: the stock model computes what the cut denoiser computes.
    """
    from .stock_unet import express_unet

    denoiser = uncompiled(denoiser)
    if narrow := next((a for a, m in denoiser.named_modules() if "narrowed_from" in vars(m)), None):
        return f"{narrow}: no stock config gives one layer a width of its own"
    if several := next((a for a, m in denoiser.named_modules() if isinstance(m, Experts)), None):
        return f"{several}: no stock config has convolutions of several experts"
    cls, config = base_class(denoiser), base_config(denoiser)
    if cls.__name__ in ("UNet2DConditionModel", "UNet2DModel"):
        found: Any = express_unet(denoiser, config)
        candidates = found if isinstance(found, str) else [found]
    else:
        candidates = _depths(denoiser, cls, config)
    if isinstance(candidates, str):
        return candidates
    reason = ""
    for changed, moved in candidates:
        result = _matched(denoiser, cls, changed, moved)
        if isinstance(result, Stock):
            return _special(denoiser, result)
        reason = reason or result  # the first candidate is the likeliest
    first, reason = next(absent(denoiser), ""), reason or "no stock config has this shape"
    return reason if first in reason else f"{first}: {reason}"


def build_on_meta(cls: Any, config: dict[str, Any]) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return cls.from_config(config).eval()


def _depths(denoiser: nn.Module, cls: Any, config: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]] | str:
    """Configs with fewer blocks. Which key counts which list is found by trying: names differ from class to class."""
    choices: list[list[tuple[str, int]]] = []
    moved: dict[str, str] = {}
    changed = dict(config)
    if inner := next((a for a in absent(denoiser) if not _listed(denoiser, a)), None):
        return f"{inner}: no stock config leaves out a layer inside a block"
    for name, group in denoiser.named_children():
        gone = [i for i, m in enumerate(group) if isinstance(m, Absent)] if isinstance(group, nn.ModuleList) else []
        if not gone:
            continue
        assert isinstance(group, nn.ModuleList)
        stay = [i for i in range(len(group)) if i not in gone]
        if not stay and cls.__name__ not in WITHOUT_BLOCKS:
            return f"{name}.{gone[0]}: a {cls.__name__} needs at least one of its {name}"
        if any("skip" in inspect.signature(type(m).forward).parameters for m in group):
            return f"{name}.{gone[0]}: these blocks hand skip connections over by their numbers"
        keys = [k for k, v in config.items() if v == len(group) and isinstance(v, int) and not isinstance(v, bool)]
        if not keys:
            return f"{name}.{gone[0]}: no setting of a {cls.__name__} counts its {name}"
        choices.append(sorted(((k, len(stay)) for k in keys), key=lambda c: not any(w in c[0] for w in ("layer", "depth"))))
        moved |= {f"{name}.{old}": f"{name}.{new}" for new, old in enumerate(stay) if old != new}
        if name == "transformer_blocks" and config.get("dual_attention_layers"):
            changed["dual_attention_layers"] = [n for n, old in enumerate(stay) if old in config["dual_attention_layers"]]
    picks = [pick for pick in itertools.product(*choices) if len({k for k, _ in pick}) == len(pick)]
    return [({**changed, **dict(pick)}, moved) for pick in picks]


def _listed(denoiser: nn.Module, address: str) -> bool:
    return isinstance(denoiser.get_submodule(address.rpartition(".")[0]), nn.ModuleList) and address.count(".") == 1


def _matched(denoiser: nn.Module, cls: Any, config: dict[str, Any], moved: dict[str, str]) -> Stock | str:
    """Compare names and shapes of the stock model with those that the cuts leave."""
    try:
        model = build_on_meta(cls, config)
    except (ValueError, TypeError, AttributeError, IndexError, AssertionError, RuntimeError, KeyError) as e:
        return f"{cls.__name__} cannot be built that way ({type(e).__name__})"
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    have = {renamed(key, moved): key for key in denoiser.state_dict() if not _under_absent(denoiser, key)}
    shapes = {k: tuple(v.shape) for k, v in denoiser.state_dict().items()}
    parts: dict[str, Part] = {}
    for key, shape in wanted.items():
        source = have.get(key)
        if source is None:
            return f"the stock model has a {key}, which the cuts leave out"
        if shapes[source] == shape:
            parts[key] = Part(source)
        elif (rows := _last_of_sd3(cls, key, shapes[source], shape)) is not None:
            parts[key] = Part(source, rows)
        else:
            return f"{key} has the shape {shapes[source]} and the stock model wants {shape}"
    if left := [k for k in have if k not in wanted and not _dropped_by_sd3(cls, k, config)]:
        return f"the stock model has no {left[0]}"
    result = Stock(cls, config, parts, moved, model)
    return _other_setting(denoiser, result) or result


def _other_setting(denoiser: nn.Module, stock: Stock) -> str | None:
    """What shapes do not show: numbers of heads, scales, ... of modules that have another value in the stock model."""
    here = {renamed(address, stock.modules): module for address, module in denoiser.named_modules()}
    last = f"transformer_blocks.{stock.config.get('num_layers', 0) - 1}"
    exempt = {""}  # it and the stages only hold the config's numbers; what those are used for is in the modules below
    if stock.cls.__name__ == "SD3Transformer2DModel":
        exempt |= {last, f"{last}.attn", f"{last}.norm1_context.linear"}
    for address, theirs in stock.model.named_modules():
        ours = here.get(address)
        if address in exempt or re.fullmatch(r"mid_block|(down|up)_blocks\.\d+", address) or type(ours) is not type(theirs):
            continue
        have, want = _settings(ours), _settings(theirs)
        if differing := [k for k in want if k in have and have[k] != want[k]]:
            return f"{address}: {differing[0]} is {have[differing[0]]} and would be {want[differing[0]]} in a stock model"
    return None


def _settings(module: Any) -> dict[str, Any]:
    """Plain values that a module was built with."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and not k.startswith("_")}
    return {k: v for k, v in plain.items() if k not in ("training", "gradient_checkpointing")}


def _under_absent(denoiser: nn.Module, key: str) -> bool:
    """Whether a weight belongs to a stand-in (a ResNet's shortcut, a DiT's first embedder)."""
    parts = key.split(".")
    return any(isinstance(denoiser.get_submodule(".".join(parts[:n])), Absent) for n in range(1, len(parts)))


def _last_of_sd3(cls: Any, key: str, have: tuple[int, ...], want: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """SD3's last block drops the text: of its text modulation only two of six parts are left, in the other order.

    AdaLN-Zero holds (shift, scale, gate, shift, scale, gate) of width d, AdaLN-continuous (scale, shift).
    """
    if cls.__name__ != "SD3Transformer2DModel" or ".norm1_context.linear." not in key or have[0] != 3 * want[0]:
        return None
    d = want[0] // 2
    return (d, 2 * d), (0, d)


def _dropped_by_sd3(cls: Any, key: str, config: dict[str, Any]) -> bool:
    last = f"transformer_blocks.{config.get('num_layers', 0) - 1}."
    return cls.__name__ == "SD3Transformer2DModel" and key.startswith((f"{last}ff_context.", f"{last}attn.to_add_out."))


def _special(denoiser: nn.Module, result: Stock) -> Stock | str:
    """What names and shapes do not show: the output layer of a DiT reads the embedder of its first block."""
    first = getattr(denoiser, "transformer_blocks", [None])[0] if result.cls.__name__ == "DiTTransformer2DModel" else None
    if isinstance(first, Absent):
        source = next(old for old, new in result.modules.items() if new == "transformer_blocks.0")
        ours, theirs = first.norm1.emb.state_dict(), denoiser.get_submodule(f"{source}.norm1.emb").state_dict()  # type: ignore[union-attr]
        if not all(v.is_meta or torch.equal(v, theirs[k]) for k, v in ours.items()):
            return (
                f"the output layer reads the timestep embedder of transformer_blocks.0, which is cut, and that of {source} "
                "holds other weights"
            )
    return result


def absent(denoiser: nn.Module) -> Iterator[str]:
    """Addresses of the stand-ins in a denoiser."""
    for address, module in uncompiled(denoiser).named_modules():
        if isinstance(module, Absent):
            yield address
