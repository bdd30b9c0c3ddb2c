"""Recipes: the YAML that teams share, as frozen models. Unknown keys are refused, all errors are shown at once with file:line."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, ValidationError

from . import methods
from .candidate import Data
from .errors import UserError, one_line
from .gates import Gate, metrics_behind
from .methods import suggest
from .stages import DistillStage, PruneStage, SearchStage


class Evaluate(Data):
    """How every result of the recipe is scored."""

    # Image folder, zip, statistics file, zoo:NAME or teacher (the default); a mapping as in features.
    reference: str | dict[str, str] | None = None
    # Extractor of what images are compared by; zoo models have zoo:judge by default. A mapping gives single metrics their own:
    # {default: inception, clip_score: "clip:ViT-B-32/openai"}.
    features: str | dict[str, str] | None = None
    metrics: tuple[str, ...] = Field(default=("fid", "clip_score"), min_length=1)
    samples: int = Field(default=2048, ge=4)  # images behind each number that is reported
    teacher_steps: int = Field(default=50, ge=1)  # for reference: teacher, steps of the model's own outputs


Stage = SearchStage | PruneStage | DistillStage


class Recipe(Data):
    """A model, how it is scored, and a chain of stages."""

    lissom: Literal[1]  # version of the recipe format
    name: str = Field(default="recipe", pattern=r"^\w[\w.-]*$")  # names the output folder too
    model: str  # hub id (id@revision), folder, or zoo:NAME
    model_hash: str | None = None  # refuse to run on other weights than these
    seed: int = Field(default=0, ge=0)
    prompts: str | None = None  # .txt or .jsonl, relative to the recipe; the zoo has balanced classes by default
    call: dict[str, Any] = Field(default_factory=dict)  # further `__call__` arguments: guidance_scale, height, …
    evaluate: Evaluate = Evaluate()
    # Other models that may make steps of a plan, by the name that the plan calls them: as `model`. Same latents, same schedule.
    models: dict[Annotated[str, Field(pattern=r"^\w[\w-]*$")], Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict
    )
    stages: tuple[Stage, ...] = Field(min_length=1)
    gates: dict[str, Gate] = Field(default_factory=dict)  # against the recipe's own model: `run` exits 3 or 4


VERBS: dict[str, type[Stage]] = {"search": SearchStage, "prune": PruneStage, "distill": DistillStage}


def verb_of(stage: Stage) -> str:
    """search, prune, …"""
    return next(verb for verb, kind in VERBS.items() if isinstance(stage, kind))


def read(path: Path, overrides: Iterable[str] = ()) -> tuple[Recipe, str]:
    """The recipe of a YAML file, and its exact text. overrides: `key.path=value`, e.g. stages.0.trials=60."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read the recipe ({e}). `lissom recipes list` shows the shipped ones.") from e
    return parse(text, str(path), overrides), text


def parse(text: str, where: str, overrides: Iterable[str] = ()) -> Recipe:
    """Validate the text of a recipe; UserError lists every mistake as `file:line: what, what to do`."""
    data, lines, wrong = _mapping(text, where, "a recipe is a mapping with the keys lissom, model and stages")
    for text_ in overrides:
        override(data, text_)
    return build(data, where, lines, wrong)


def read_gates(path: Path) -> dict[str, Gate]:
    """A gates file: the mapping that stands under `gates:` in a recipe, without that key.

    Raises UserError with file:line for every mistake, an unknown metric included.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read the gates ({e}). Give a YAML file such as `fid: {{max_ratio: 1.1}}`.") from e
    data, lines, wrong = _mapping(text, str(path), "gates are a mapping such as `fid: {max_ratio: 1.1}`")
    if set(data) == {"gates"}:
        raise UserError(f"{path}:1: leave the key `gates:` out: the file holds what stands under it in a recipe.")
    found: dict[str, Gate] = {}
    for name, raw in data.items():
        at = f"{path}:{lines.get((str(name),), 1)}: "
        try:
            metrics_behind({str(name): Gate(min=0)})
            found[str(name)] = Gate.model_validate(raw)
        except UserError as e:
            wrong.append(at + str(e).removeprefix("gates: "))
        except ValidationError as e:
            for error in e.errors():
                place = lines.get((str(name), *error["loc"]), lines.get((str(name),), 1))
                dotted = ".".join(map(str, (name, *error["loc"])))
                wrong.append(f"{path}:{place}: {dotted}: {_message(error, Gate.model_fields)}")
    if not data:
        wrong.append(f"{path}:1: no gate in it. Write one, such as `fid: {{max_ratio: 1.1}}`.")
    if wrong:
        raise UserError("\n".join(wrong))
    return found


def build(
    data: dict[str, Any], where: str, lines: Mapping[tuple[str | int, ...], int] | None = None, wrong: list[str] | None = None
) -> Recipe:
    """A recipe from plain data (see `parse`)."""
    wrong = wrong if wrong is not None else []
    lines = lines or {}

    def complain(location: tuple[str | int, ...], message: str) -> None:
        line = next((lines[location[:n]] for n in range(len(location), -1, -1) if location[:n] in lines), None)
        dotted = ".".join(str(part) for part in location)
        wrong.append(f"{where}{f':{line}' if line else ''}: {dotted + ': ' if dotted else ''}{message}")

    data = dict(data)
    stages = data.get("stages")
    refused: set[tuple[str | int, ...]] = set()  # stages of which all is said
    if isinstance(stages, list):
        data["stages"] = [_stage(raw, ("stages", i), complain) for i, raw in enumerate(stages)]
        refused = {("stages", i) for i, stage in enumerate(data["stages"]) if stage is None}
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as e:
        errors = e.errors()
        for error in errors:
            if error["loc"][:2] in refused:
                continue
            if error["type"] == "too_short" and len(errors) > 1:
                continue  # pydantic also says that a list whose items are wrong is empty
            complain(error["loc"], _message(error))
    if recipe is not None:
        _gates(recipe, complain)
    if wrong or recipe is None:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    return recipe


def override(data: dict[str, Any], text: str) -> None:
    """Apply `key.path=value` in place; the value is read as YAML, so 3, 0.5, true, [1, 2] and {a: 1} mean what they say."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set {text}: write it as key=value, e.g. --set population=20 or --set stages.0.trials=60.")
    *parents, last = path.split(".")
    at: Any = data
    for part in parents:
        at = at[int(part)] if isinstance(at, list) and part.isdigit() and int(part) < len(at) else _enter(at, part, text)
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as e:
        raise UserError(f"--set {text}: the value is not valid YAML ({e}).") from e
    if not isinstance(at, dict):
        raise UserError(f"--set {text}: {'.'.join(parents)} is not a mapping.")
    at[last] = parsed


def settings(verb: str, method: str, given: Mapping[str, Any]) -> Any:
    """The Config of a verb's method, or of a loss (verb: loss), from plain settings; UserError with a suggestion where one is unknown or out of range."""
    config = methods.load("distill", method).Config if verb == "loss" else _config(verb, method)
    try:
        return config.model_validate(dict(given))
    except ValidationError as e:
        known = list(config.model_fields)
        raise UserError("\n".join(f"{method}: {'.'.join(map(str, x['loc']))}: {_message(x, known)}" for x in e.errors())) from e


def names(verb: str) -> list[str]:
    """What may stand beside a verb: its methods, for distill its presets."""
    return sorted(methods.presets()) if verb == "distill" else methods.names(verb)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe for editors, with every method's own settings."""
    schema = Recipe.model_json_schema()
    stages = []
    for verb, kind in VERBS.items():
        common = schema["$defs"].pop(kind.__name__)
        common["properties"].pop("settings")
        for name in names(verb):
            config = _config(verb, name).model_json_schema()
            own = {**common["properties"], **config.get("properties", {}), verb: {"const": name}}
            stages.append(
                {**common, "title": f"{verb}: {name}", "properties": own, "description": config.get("description", "")}
            )
            schema["$defs"].update(config.get("$defs", {}))
        if verb == "distill":
            continue
        free = {**common, "additionalProperties": True, "properties": {**common["properties"], verb: {"pattern": r"\."}}}
        stages.append({**free, "title": f"{verb}: a module of your own"})
    schema["properties"]["stages"]["items"] = {"anyOf": stages}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "lissom recipe"}


def _stage(raw: Any, at: tuple[str | int, ...], complain: Any) -> Any:
    """Split a stage's keys into the verb's own and the method's settings, and validate the latter; None if it is no stage."""
    if not isinstance(raw, dict):
        complain(at, f"a stage is a mapping such as {{search: autodiffusion, steps: 4}}, got {raw!r}")
        return None
    verbs = [v for v in VERBS if v in raw]
    if len(verbs) != 1:
        near = next((s for k in raw if (s := suggest(str(k), VERBS))), "")
        complain(
            at, f"exactly one of {', '.join(VERBS)} says what the stage does; its keys are {', '.join(map(str, raw))}.{near}"
        )
        return None
    verb = verbs[0]
    own = {k: v for k, v in raw.items() if k in VERBS[verb].model_fields and k != "settings"}
    rest = {str(k): v for k, v in raw.items() if k not in own}
    try:
        config = _config(verb, str(raw[verb]))
    except UserError as e:
        complain((*at, verb), str(e))
        return None
    known = [*(k for k in VERBS[verb].model_fields if k != "settings"), *config.model_fields]
    errors = []
    try:
        own["settings"] = config.model_validate(rest).model_dump(mode="json")
    except ValidationError as e:
        errors += e.errors()
    try:
        stage = VERBS[verb].model_validate(own)
    except ValidationError as e:
        errors += e.errors()
    for error in errors:
        complain((*at, *error["loc"]), _message(error, known))
    if not errors and isinstance(stage, DistillStage) and (wrong := _losses(stage)):
        for name, message in wrong:
            complain((*at, "losses", name), message)
        return None
    return None if errors else stage


def _config(verb: str, method: str) -> Any:
    """A method's Config; a preset of losses has no settings."""
    if verb != "distill":
        return methods.load(verb, method).Config
    if method not in (known := methods.presets()):
        raise UserError(f"no preset {method!r} of losses; there are {', '.join(known)}.{suggest(method, known)}")
    return _Nothing


def _losses(stage: DistillStage) -> list[tuple[str, str]]:
    """What is wrong with the losses that a stage names: (name, message)."""
    wrong = []
    for name, given in stage.losses.items():
        rest = {k: v for k, v in given.items() if k != "weight"} if isinstance(given, dict) else {}
        try:
            settings("loss", name, rest)
        except UserError as e:
            wrong.append((name, str(e)))
    return wrong


class _Nothing(Data):
    """Settings of what has none."""

    paper: ClassVar[str] = ""


def _gates(recipe: Recipe, complain: Any) -> None:
    """What cannot be measured for the gates, and features or references of metrics that nobody asked for."""
    measured = list(recipe.evaluate.metrics)
    for name in recipe.gates:
        try:
            measured += metrics_behind({name: Gate(min=0)}, recipe.evaluate.metrics)
        except UserError as e:
            complain(("gates", name), str(e).removeprefix("gates: "))
    for what in ("features", "reference"):
        given = getattr(recipe.evaluate, what)
        for key in given if isinstance(given, dict) else ():
            if key not in ("default", *measured):
                complain(
                    ("evaluate", what, key), f"neither default nor one of the metrics ({', '.join(dict.fromkeys(measured))})"
                )
    features = recipe.evaluate.features
    if isinstance(features, dict) and "default" not in features and not recipe.model.startswith("zoo:"):
        for name in dict.fromkeys(measured[len(recipe.evaluate.metrics) :]):
            if name not in features and "features" in methods.load("evaluate", name).needs:
                complain(("evaluate", "features"), f"{name}, which a gate names, has none: add an entry for it, or a default")


def _mapping(text: str, where: str, expected: str) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int], list[str]]:
    """A YAML mapping, the line of every value in it, and what is wrong so far (a key given twice).

    Raises UserError for what is no YAML or no mapping; expected: what it should have been.
    """
    wrong: list[str] = []
    lines: dict[tuple[str | int, ...], int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            for path, line, repeated in _positions(node):
                lines[path] = line
                if repeated:
                    wrong.append(f"{where}:{line}: {path[-1]!r} is given twice. Keep one.")
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else 1
        raise UserError(f"{where}:{line}: not valid YAML ({e.problem}).") from e
    except (yaml.YAMLError, ValueError) as e:  # control characters, a date such as 2024-99-99
        raise UserError(f"{where}: not valid YAML ({one_line(e)}).") from e
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{where}:1: {expected}; this is {kind}.")
    return data, lines, wrong


def _message(error: Any, known: Iterable[str] | None = None) -> str:
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        owners: dict[str, type[Data]] = {"evaluate": Evaluate, "gates": Gate}
        owner = owners.get(str(error["loc"][0]), Recipe) if len(error["loc"]) > 1 else Recipe
        choices = list(known) if known is not None else list(owner.model_fields)
        return f"unknown key. Known here: {', '.join(choices)}.{suggest(name, choices)}"
    text = error["msg"].removeprefix("Value error, ").replace("valid tuple", "list").replace("valid dictionary", "mapping")
    given = "" if error["type"] in ("missing", "value_error") else f", got {error['input']!r}"
    return f"{text[0].lower()}{text[1:]}{given}"


def _positions(
    node: Any, path: tuple[str | int, ...] = (), within: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], int, bool]]:
    """(path, line from 1, key seen before) of every value. within: the nodes around this one, as an alias may name one."""
    yield path, node.start_mark.line + 1, False
    if id(node) in within:
        raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
    within = (*within, id(node))
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            yield (*path, name), key.start_mark.line + 1, name in seen
            seen.add(name)
            for deeper in _positions(value, (*path, name), within):
                if deeper[0] != (*path, name):
                    yield deeper
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _positions(value, (*path, i), within)


def _enter(at: Any, part: str, text: str) -> Any:
    if not isinstance(at, dict):
        raise UserError(f"--set {text}: there is no {part!r} here.")
    return at.setdefault(part, {})
