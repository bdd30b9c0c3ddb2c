"""Latency, memory, parameters and MACs on a rig that a test can work out."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lissom.core.candidate import SamplingPlan, Scheduler, Step
from lissom.core.cost import Costs
from lissom.core.measurement import half_samples
from lissom.evaluate import latency, macs, memory, params
from lissom.evaluate._sample import Rig, Sample, Score


class Bench:
    """A pipeline that takes 2 ms an image and holds 16 MiB of weights, and at most 128 MiB more while it runs."""

    def __init__(self, plan: SamplingPlan | None = None) -> None:
        self.calls: list[int] = []
        self.weight = torch.zeros(16 * 2**18)  # 16 MiB
        self.was_compiled: list[bool] = []
        self.compiled_now = False
        self.rig = Rig(
            plan=plan, evaluations=4, params=123, device="cpu", costs=lambda: Costs(total=100, layers={"a": 30, "a.b": 10}, params=123),
            call=self.call, weights=lambda: [self.weight, self.weight.view(4, -1)], compiled=self.compiled,
            conditions={"device": "cpu (a bench)", "dtype": "float32"},
        )  # fmt: skip

    def call(self, batch: int) -> Callable[[], None]:
        def once() -> None:
            self.calls.append(batch)
            self.was_compiled.append(self.compiled_now)
            held = torch.ones(64 * 2**18)
            time.sleep(0.002 * batch)
            other = held.view(8, -1) + 1  # two of 64 MiB at once
            del held
            other.mul_(2)
            torch.ones(32 * 2**18)

        return once

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        self.compiled_now = True
        yield
        self.compiled_now = False

    def evaluate(self, metric: Any, **settings: Any) -> dict[str, Score]:
        found = metric.evaluate(Sample(torch.zeros((0, 0)), rig=self.rig), metric.Config(**settings))
        return found if isinstance(found, dict) else {next(iter(metric.parts)): found}


def test_every_batch_size_is_warmed_up_timed_and_named() -> None:
    bench = Bench()
    found = bench.evaluate(latency, batches=(1, 8), warmup=3, repeats=6)
    assert bench.calls == [1] * 9 + [8] * 9
    assert list(found) == ["latency", "latency_p90", "latency@8", "latency_p90@8"]
    assert 2 <= found["latency"].value <= found["latency_p90"].value and 16 <= found["latency@8"].value
    assert all(score.n == 6 and len(score.replicates) == 40 for score in found.values())
    assert found["latency@8"].conditions == {
        "device": "cpu (a bench)", "dtype": "float32", "batch": "8", "compiled": "no",
    }  # fmt: skip


def test_quantiles_and_their_replicates() -> None:
    times = [float(t) for t in range(1, 21)]
    found = latency._quantile_score(times, 0.9, {})
    assert found.value == pytest.approx(float(np.quantile(times, 0.9)))
    half = half_samples(20)[5]
    assert found.replicates[5] == pytest.approx(float(np.quantile([times[i] for i in half], 0.9)))


def test_compiling_is_not_timed_and_ends() -> None:
    bench = Bench()
    found = bench.evaluate(latency, warmup=0, repeats=4, compile=True)
    assert bench.was_compiled == [True] * 5 and not bench.compiled_now  # one call more than is timed
    assert found["latency"].conditions["compiled"] == "yes"


def test_the_peak_is_of_the_tensors_of_one_call() -> None:
    clutter = torch.ones(256 * 2**18)  # the process holds more, which is not the pipeline's
    (found,) = Bench().evaluate(memory, batch=2).values()
    assert (found.value, found.exact, len(clutter)) == (16 + 2 * 64, True, 256 * 2**18)
    assert found.conditions == {"dtype": "float32", "batch": "2", "memory of": "cpu"}


def test_counts_are_exact() -> None:
    (found,) = Bench().evaluate(params).values()
    assert (found.value, found.exact, found.replicates) == (123, True, ())
    assert Bench().evaluate(macs)["macs"].value == 400
    steps = (Step(timestep=9, skip=("a", "a.b")), Step(timestep=5))
    plan = SamplingPlan(scheduler=Scheduler(name="DDIMScheduler"), steps=steps)
    assert Bench(plan).evaluate(macs)["macs"].value == 170


@pytest.mark.parametrize(
    ("metric", "settings"),
    [(latency, {"batches": ()}), (latency, {"batches": (0,)}), (latency, {"repeats": 3}), (memory, {"batch": 0})],
)
def test_settings_out_of_range(metric: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        metric.Config(**settings)


def test_storages_count_what_holds_numbers_and_what_grows() -> None:
    from lissom.evaluate._storages import Storages

    with Storages([torch.empty(1000, device="meta"), torch.zeros(250)]) as storages:
        grown = torch.empty(0).resize_(1_000_000)
        view = grown[:10].view(2, 5)
        del grown
        assert storages.now == 1000 + 4_000_000  # the view holds it
        del view
    assert (storages.now, storages.peak) == (1000, 1000 + 4_000_000)
