"""Recipes: every mistake at once, with its line and a way out; what is right means what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lissom.core import recipe
from lissom.core.errors import UserError

GOOD = """# A comment.
lissom: 1
name: small
model: zoo:fashion
seed: 3
evaluate: {reference: zoo:fashion, metrics: [fid, accuracy], samples: 64}
stages:
  - search: autodiffusion
    steps: 5
    trials: 7
    budget: {macs: 0.8}
    population: 6
  - {search: random_search, batch: 2}
"""


def wrong(text: str) -> list[str]:
    with pytest.raises(UserError) as e:
        recipe.parse(text, "r.yaml")
    return str(e.value).splitlines()


def test_a_recipe_means_what_it_says() -> None:
    found = recipe.parse(GOOD, "r.yaml")
    first, second = found.stages
    assert (found.name, found.seed, found.evaluate.samples) == ("small", 3, 64)
    assert (first.method, first.steps, first.trials, first.budget) == ("autodiffusion", 5, 7, {"macs": 0.8})
    assert first.settings["population"] == 6 and second.settings == {"batch": 2}


def test_every_mistake_is_told_at_once_with_its_line_and_what_to_do() -> None:
    text = """lissom: 2
modle: zoo:fashion
model: 5
seed: -1
evaluate:
  sampels: 64
  samples: 2
stages:
  - search: autodiffusion
    stepz: 4
    steps: 0
    population: many
    budget: {macs: 1.5}
  - {search: evolution}
  - {serch: autodiffusion}
  - 7
seed: 4
"""
    lines = wrong(text)
    said = {line.partition(": ")[0]: line for line in lines}
    expected = {
        "r.yaml:1": "lissom: input should be 1, got 2",
        "r.yaml:2": "modle: unknown key.",
        "r.yaml:3": "model: input should be a valid string, got 5",
        "r.yaml:6": "Did you mean 'samples'?",
        "r.yaml:7": "greater than or equal to 4, got 2",
        "r.yaml:10": "Did you mean 'steps'?",
        "r.yaml:11": "stages.0.steps: input should be greater than or equal to 1, got 0",
        "r.yaml:12": "stages.0.population: ",
        "r.yaml:14": "no method 'evolution' in search/; there are autodiffusion",
        "r.yaml:15": "Did you mean 'search'?",
        "r.yaml:16": "a stage is a mapping such as",
        "r.yaml:17": "'seed' is given twice. Keep one.",
    }
    assert set(expected) <= set(said) and len(lines) == len(set(lines))
    for place, part in expected.items():
        assert any(line.startswith(place + ": ") and part in line for line in lines), (place, lines)
    assert sum("stages.2" in line for line in lines) == 1  # once is enough


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "this is empty"),
        ("- a", 1, "this is a list"),
        ("lissom: 1\nmodel: [", 2, "not valid YAML"),
        ("lissom: 1\n\tmodel: x", 2, "not valid YAML"),
        ("a: &a [*a]", 1, "contains itself"),
        ("lissom: 1\nmodel: m\nstages: {search: random_search}", 3, "stages: input should be a list"),
        ("lissom: 1\nmodel: m\nstages: []", 3, "stages: "),
        ("lissom: 1\nmodel: m", 1, "stages: field required"),
        ("lissom: 1\nmodel: m\n1: 2\nstages: [{search: random_search}]", 1, "keys should be strings"),
        ("lissom: 1\nmodel: m\nstages:\n- {search: random_search, space: [skips]}", 4, "space must contain timesteps"),
        ("lissom: 1\nmodel: m\nstages:\n- {search: random_search, budget: {macs: 0}}", 4, "above 0 and at most 1"),
        ("lissom: 1\nmodel: m\nstages:\n- {search: random_search, budget: {flops: 0.5}}", 4, "should be 'macs'"),
        ("lissom: 1\nmodel: m\nstages:\n- {search: random_search, settings: {batch: 3}}", 4, "settings: unknown key"),
    ],
)
def test_one_mistake_is_one_sentence(text: str, line: int, says: str) -> None:
    (said,) = wrong(text)
    assert said.startswith(f"r.yaml:{line}: ") and says in said, said


@pytest.mark.parametrize("text", ["\0", "d: 2024-99-99"])
def test_text_that_is_no_yaml_is_refused(text: str) -> None:
    assert "not valid YAML" in wrong(text)[0]


def test_yaml_is_read_safely() -> None:
    assert "not valid YAML" in wrong("a: !!python/object/apply:os.getcwd []")[0]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    for name in ("absent.yaml", "binary.yaml"):
        with pytest.raises(UserError, match=rf"{name}: cannot read the recipe"):
            recipe.read(tmp_path / name)


def test_overrides_reach_everything_and_say_where_they_cannot() -> None:
    changes = ["stages.0.trials=9", "stages.1.batch=4", "evaluate.samples=128", "call.guidance_scale=1.5", "name=other"]
    found = recipe.parse(GOOD, "r.yaml", changes)
    assert (found.stages[0].trials, found.stages[1].settings["batch"], found.evaluate.samples) == (9, 4, 128)
    assert found.call == {"guidance_scale": 1.5} and found.name == "other"
    for text, says in (
        ("stages.7.trials=1", "there is no '7'"), ("name.x=1", "is not a mapping"), ("seed", "write it as key=value"),
        ("=3", "write it as key=value"), ("seed=[", "not valid YAML"), ("stages=1", "should be a list"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says.replace("[", r"\[")):
            recipe.parse(GOOD, "r.yaml", [text])


def test_settings_are_the_methods_own() -> None:
    assert recipe.settings("search", "random_search", {"batch": 3}).batch == 3
    with pytest.raises(UserError, match="Did you mean 'population'"):
        recipe.settings("search", "autodiffusion", {"popultion": 3})


def test_a_recipe_that_is_written_again_is_the_same_recipe() -> None:
    found = recipe.parse(GOOD, "r.yaml")
    assert recipe.Recipe.model_validate_json(found.canonical()) == found


def allows(schema: dict[str, Any], data: Any) -> bool:
    """Whether a schema's keys, constants and nesting fit: enough of JSON Schema for these recipes."""
    if "$ref" in schema:
        return allows(FULL["$defs"][schema["$ref"].rpartition("/")[2]], data)
    if "anyOf" in schema:
        return any(allows(option, data) for option in schema["anyOf"])
    if "const" in schema:
        return bool(data == schema["const"])
    if "pattern" in schema and isinstance(data, str):
        return re.search(schema["pattern"], data) is not None
    if isinstance(data, dict) and "properties" in schema:
        known, more = schema["properties"], schema.get("additionalProperties", True)
        return (more or set(data) <= set(known)) and all(allows(known[k], v) for k, v in data.items() if k in known) and all(
            key in data for key in schema.get("required", ())
        )  # fmt: skip
    if isinstance(data, list) and "items" in schema:
        return all(allows(schema["items"], item) for item in data)
    kinds: dict[str, Any] = {
        "boolean": bool,
        "string": str,
        "integer": int,
        "number": (int, float),
        "null": type(None),
        "array": list,
        "object": dict,
    }
    return "type" not in schema or isinstance(data, kinds[schema["type"]])


FULL = recipe.json_schema()


def valid(data: Any) -> bool:
    try:
        import jsonschema
    except ImportError:
        return allows(FULL, data)
    return bool(jsonschema.Draft202012Validator(FULL).is_valid(data))


def test_the_schema_takes_what_the_parser_takes_and_knows_every_methods_settings() -> None:
    assert valid(yaml.safe_load(GOOD))
    for old, new in (
        ("steps: 5", "stepz: 5"),
        ("batch: 2", "population: 6"),
        ("lissom: 1", "lissom: 2"),
        ("seed: 3", "sed: 3"),
    ):
        assert not valid(yaml.safe_load(GOOD.replace(old, new))), new
    titles = [option["title"] for option in FULL["properties"]["stages"]["items"]["anyOf"]]
    own = {
        verb: [] if verb == "distill" else [f"{verb}: a module of your own"] for verb in recipe.VERBS
    }  # presets are ours alone
    wanted = [[*(f"{verb}: {name}" for name in recipe.names(verb)), *own[verb]] for verb in recipe.VERBS]
    assert titles == [title for each in wanted for title in each]


SHIPPED = sorted((Path(recipe.__file__).parents[1] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[p.stem for p in SHIPPED])
def test_shipped_recipes_are_valid_and_introduce_themselves(path: Path) -> None:
    found, text = recipe.read(path)
    assert valid(yaml.safe_load(text)) and text.startswith("# ") and "lissom run" in text
    assert found.stages
