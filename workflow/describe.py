"""Recipes as text: the shipped ones, the recipe that a command line amounts to, and what a recipe would cost."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..core import models
from ..core.errors import UserError
from ..core.methods import suggest
from ..core.recipe import Recipe, override, verb_of

RECIPES = Path(__file__).parent.parent / "recipes"


def names() -> list[str]:
    """The shipped recipes, as folder/name."""
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml"))


def shipped(name: str) -> Path:
    """The file of a shipped recipe. Raises UserError with a suggestion."""
    name = name.removesuffix(".yaml")
    known = names()
    if name not in known:
        raise UserError(
            f"{name}: no such recipe, neither a file here nor shipped; there are {', '.join(known)}.{suggest(name, known)}"
        )
    return RECIPES / f"{name}.yaml"


def recipe_text(data: dict[str, Any], verb: str) -> str:
    """The YAML of what a command line asks for, with the model pinned to its revision and weights. verb: the command."""
    folder, ref = models.resolve(data["model"])
    pinned = {**data, "model": ref}
    if (folder / "model_index.json").is_file():
        models.check_folder(folder, trust_remote_code=True)
        pinned["model_hash"] = models.fingerprint(folder)
    if not ref.startswith("zoo:") and Path(ref).is_dir():
        pinned["model"] = str(Path(ref).resolve())
    if "models" in data:
        pinned["models"] = {name: models.identify(ref, trust_remote_code=True)[0] for name, ref in data["models"].items()}
    body = dump(pinned)
    return f"# Written by `lissom {verb}`; run it again with `lissom run`.\n" + body


def dump(data: dict[str, Any]) -> str:
    """A recipe's YAML, its keys in the usual order."""
    order = [k for k in Recipe.model_fields if k in data]
    return yaml.safe_dump({k: data[k] for k in order}, sort_keys=False, allow_unicode=True, width=120)


def effective(text: str, overrides: Iterable[str]) -> str:
    """The recipe's text with overrides applied. Without overrides it is the exact text, comments and all."""
    changes = list(overrides)
    if not changes:
        return text
    data = yaml.safe_load(text)
    for change in changes:
        override(data, change)
    said = "".join(f"# --set {' '.join(change.split())}\n" for change in changes)
    return said + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)


def estimate(recipe: Recipe, context: Any) -> dict[str, Any]:
    """What every stage would take and make, each as if it ran on the recipe's own model."""
    stages = [_estimates(verb_of(stage)).estimate(stage, recipe.model, context) for stage in recipe.stages]
    gates = {"images": 2 * recipe.evaluate.samples, "of": list(recipe.gates)} if recipe.gates else None
    return {"recipe": recipe.name, "stages": stages} | ({"gates": gates} if gates else {})


def say(estimates: dict[str, Any]) -> str:
    """The estimate for people."""
    said = [_estimates(s["stage"].partition(":")[0]).say(s) for s in estimates["stages"]]
    later = ["  (later stages: as if they ran on the recipe's own model)"] if len(said) > 1 else []
    if gates := estimates.get("gates"):
        said.append(
            f"gates on {', '.join(gates['of'])}: {gates['images']:,} more images, of the recipe's model and of the result"
        )
    return "\n".join([f"{estimates['recipe']}: nothing was run.", *(f"  {text}" for text in said), *later])


def _estimates(verb: str) -> Any:
    """The module that says what a verb's stages take."""
    from . import _distill_estimate, _prune_estimate, _search_estimate

    return {"search": _search_estimate, "prune": _prune_estimate, "distill": _distill_estimate}[verb]
