"""One candidate, one key; seeds that never meet; text that stays the same."""

import json
import random
from types import SimpleNamespace

import pytest
from lissom.core.candidate import Candidate, Cut, Request, SamplingPlan, Scheduler, Seeds, Step, canonical, image_seed
from pydantic import ValidationError

DDIM = Scheduler(name="DDIMScheduler", config={"beta_start": 0.1, "steps_offset": 1})
ROLES = ("calibrate", "search", "rescore", "report")


def key(*steps: Step, cuts: tuple[Cut, ...] = (), count: int = 8, origin: str = "", evaluator: str = "e") -> str:
    plan = SamplingPlan(scheduler=DDIM, steps=steps)
    return Request(
        candidate=Candidate(plan=plan, cuts=cuts), seeds=Seeds(role="search", base=0, count=count), origin=origin
    ).key(evaluator)


def test_permuted_and_duplicated_genes_are_one_candidate() -> None:
    layers = ["a", "b", "c", "d"]
    keys = set()
    for seed in range(20):
        shuffled = random.Random(seed).sample(layers, 4) + ["a", "d"]
        keys.add(key(Step(timestep=9, skip=tuple(shuffled)), Step(timestep=3.0)))
    assert len(keys) == 1
    one, two = Cut(address="x", what="remove"), Cut(address="y", what="keep_heads", value=(0, 2))
    assert key(Step(timestep=9), cuts=(one, two, one)) == key(Step(timestep=9.0), cuts=(two, one))


def test_whatever_changes_the_images_or_the_value_changes_the_key_and_nothing_else_does() -> None:
    base = key(Step(timestep=9))
    others = [
        key(Step(timestep=8)), key(Step(timestep=9, sigma=1.0)), key(Step(timestep=9, skip=("a",))),
        key(Step(timestep=9), count=9), key(Step(timestep=9), evaluator="f"), key(Step(timestep=9), Step(timestep=8)),
    ]  # fmt: skip
    assert len({base, *others}) == len(others) + 1
    assert key(Step(timestep=9), origin="mutation") == base


def test_a_default_field_is_not_written_so_that_old_hashes_stay_valid() -> None:
    assert Step(timestep=9, skip=(), sigma=None).canonical() == '{"timestep":9}'
    assert Step.model_validate_json('{"timestep":9}') == Step(timestep=9)


def test_unknown_fields_and_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        Step.model_validate({"timestep": 9, "skips": []})
    with pytest.raises(ValidationError):
        Step(timestep=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": float("inf")})


def test_data_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Step(timestep=9).timestep = 8  # type: ignore[misc]


@pytest.mark.parametrize("times", [(3, 3), (3, 5), ()])
def test_timesteps_strictly_descend_and_there_is_at_least_one(times: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        SamplingPlan(scheduler=DDIM, steps=tuple(Step(timestep=t) for t in times))


def test_the_text_of_a_plan_is_one_text_and_reads_back() -> None:
    plan = SamplingPlan(scheduler=DDIM, steps=(Step(timestep=9.5, sigma=0.5, skip=("b", "a")), Step(timestep=3)))
    turned = SamplingPlan(
        scheduler=Scheduler(name="DDIMScheduler", config={"steps_offset": 1, "beta_start": 0.1}),
        steps=(Step(timestep=9.5, sigma=0.5, skip=("a", "b")), Step(timestep=3.0)),
    )
    assert plan.pretty() == turned.pretty() and plan.pretty().endswith("}\n")
    assert SamplingPlan.model_validate_json(plan.pretty()) == plan
    assert [s["timestep"] for s in json.loads(plan.pretty())["steps"]] == [9.5, 3]


def test_a_scheduler_is_described_without_private_keys_and_odd_types() -> None:
    import numpy as np

    odd = SimpleNamespace(config={"_class_name": "Odd", "betas": np.array([0.5, 1.0]), "n": np.int64(3), "shift": 1.0})
    assert Scheduler.of(odd).config == {"betas": [0.5, 1.0], "n": 3, "shift": 1.0}


def test_seeds_of_roles_and_bases_never_meet() -> None:
    blocks = [Seeds(role=role, base=base, count=2000).values() for role in ROLES for base in (0, 1, 10)]
    drawn = [seed for block in blocks for seed in block]
    assert len(set(drawn)) == len(drawn) and all(0 <= seed < 2**63 for seed in drawn)


def test_an_image_has_one_seed_whatever_block_it_is_drawn_in() -> None:
    whole = Seeds(role="report", base=3, count=50).values()
    parts = [Seeds(role="report", base=3, start=s, count=10).values() for s in range(0, 50, 10)]
    assert whole == tuple(seed for part in parts for seed in part)
    assert whole[7] == image_seed("report", 3, 7)
