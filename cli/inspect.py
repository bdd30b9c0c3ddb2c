"""`lissom inspect MODEL`: what a model is made of and what can be skipped."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import _options as o


def inspect(
    ctx: typer.Context,
    model: o.Model,
    layers: Annotated[bool, typer.Option("--layers", help="List every skippable layer.")] = False,
    prompts: o.Prompts = None,
    call: o.Call = None,
    json_: o.Json = False,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    offload: o.Offload = "none",
    trust_remote_code: o.TrustRemoteCode = False,
    verbose: o.Verbose = False,
) -> None:
    """Parameters, multiply-accumulates, and the layers that a plan may skip.

    Example: lissom inspect zoo:fashion --layers
    """
    from ..workflow import evaluate as work
    from ..workflow.context import Context

    o.remember(ctx, verbose)
    recipe = work.lone(model, prompts=str(prompts) if prompts else None, call=o.pairs(call))
    machine = o.options(device, dtype, offload, trust_remote_code, chunk=1)
    found = work.inspect(model, Context(recipe, Path.cwd(), machine))
    if json_:
        print(json.dumps(found, indent=2))
    else:
        _show(found, layers)


def _show(found: dict[str, Any], every: bool) -> None:
    print(f"{found['model']}: {found['pipeline']}, {found['scheduler']}")
    tables = found["label_table_parameters"]
    note = f", of which {tables:,} in label tables" if tables else ""
    print(f"{found['denoiser']}: {found['parameters']:,} parameters{note}")
    print(f"{found['macs_per_step']:,} MACs per image and step (attention included)")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in found["layers"]:
        kinds.setdefault(layer["kind"], []).append(layer)
    for kind, members in kinds.items():
        macs = sum(m["macs"] or 0 for m in members) / found["macs_per_step"]
        print(f"  {len(members):3} {kind:18} skipping leaves: {members[0]['removal']:9} {macs:6.1%} of the MACs")
    if every:
        width = max(len(layer["address"]) for layer in found["layers"])
        for layer in found["layers"]:
            print(
                f"{layer['address']:{width}}  {layer['kind']:18} {layer['parameters']:>12,} parameters {layer['macs'] or 0:>14,} MACs"
            )
