"""`lissom inspect MODEL`: what a model is made of, what can be skipped and cut."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as o


def inspect(
    ctx: typer.Context,
    model: o.Model,
    layers: Annotated[
        bool, typer.Option("--layers", help="List every layer, and how a model without it would be saved.")
    ] = False,
    prompts: o.Prompts = None,
    call: o.Call = None,
    json_: o.Json = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    offload: o.Offload = "none",
    trust_remote_code: o.TrustRemoteCode = False,
    verbose: o.Verbose = False,
) -> None:
    """Parameters, multiply-accumulates, and the layers that a plan may skip and `lissom prune` may cut.

    Example: lissom inspect zoo:fashion --layers, lissom inspect config:sdxl
    """
    from ..workflow import inspection as work
    from ..workflow.context import Context
    from ..workflow.evaluate import lone

    o.remember(ctx, verbose)
    recipe = lone(model, prompts=str(prompts) if prompts else None, call=o.pairs(call))
    machine = o.options(device, dtype, offload, trust_remote_code, chunk=1)
    found = work.inspect(model, Context(recipe, Path.cwd(), machine), layers=layers)
    if json_:
        print(json.dumps(found, indent=2))
    else:
        _show(found, layers)


def _show(found: dict[str, Any], every: bool) -> None:
    print(f"{found['model']}: {found['pipeline']}, {found.get('scheduler') or 'structure without weights'}")
    tables = found["label_table_parameters"]
    note = f", of which {tables:,} in label tables" if tables else ""
    print(f"{found['denoiser']}: {found['parameters']:,} parameters{note}")
    per = "step" if "scheduler" in found else "denoiser call"
    print(f"{found['macs_per_step']:,} MACs per image and {per} (attention included)")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in found["layers"]:
        kinds.setdefault(layer["kind"], []).append(layer)
    for kind, members in kinds.items():
        macs = sum(m["macs"] or 0 for m in members) / found["macs_per_step"]
        freed = sum(m["freed"] for m in members) / found["parameters"]
        print(
            f"  {len(members):3} {kind:18} its absence leaves: {members[0]['removal']:9} "
            f"{freed:6.1%} of the parameters, {macs:6.1%} of the MACs"
        )
    if not found["layers"]:
        print("  no layer that can be left out")
    if every:
        _list(found)


def _list(found: dict[str, Any]) -> None:
    """Every layer, and which cuts go together."""
    width = max((len(layer["address"]) for layer in found["layers"]), default=0)
    print(f"{'address':{width}}  {'kind':17} {'leaves':9} {'parameters':>13} {'freed by a cut':>15} {'MACs':>17}  cut alone")
    for layer in found["layers"]:
        print(
            f"{layer['address']:{width}}  {layer['kind']:17} {layer['removal']:9} {layer['parameters']:>13,} {layer['freed']:>15,} "
            f"{layer['macs'] or 0:>17,}  {'plain' if layer['opens'] == 'stock' else 'remote code'}"
        )
    if found["together"]:
        print("slots that can be taken out together (which (ResNet, attention) layers stay in each stage):")
        for two in found["together"]:
            print("  " + " with ".join(f"{cut['address']} {cut['value']}" for cut in two))
