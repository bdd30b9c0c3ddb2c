"""Hard-concrete gates against the published settings' numbers, their closed forms, and finite differences."""

import math

import pytest
import torch
from lissom.prune._hard_concrete import ALPHA, GAMMA, ZERO, ZETA, alive, gate, shift, stretched
from torch import Tensor

DELTAS = (1e-8, 0.1, 0.5, 1.0)
# lambda -> (mean, P(M = 0), P(M = 1)) for each delta. Drawn by the code of arXiv 2412.02852, to three digits.
TABLE = {
    3.0: [(0.932, 0.007, 0.734), (0.978, 0.0, 0.778), (1.0, 0.0, 0.965), (1.0, 0.0, 1.0)],
    0.0: [(0.5, 0.12, 0.12), (0.5, 0.045, 0.045), (0.5, 0.0, 0.0), (0.5, 0.0, 0.0)],
    -1.0: [(0.304, 0.271, 0.048), (0.266, 0.224, 0.0), (0.205, 0.042, 0.0), (0.189, 0.0, 0.0)],
    -2.0: [(0.155, 0.502, 0.018), (0.1, 0.502, 0.0), (0.04, 0.505, 0.0), (0.023, 0.507, 0.0)],
    -3.0: [(0.068, 0.734, 0.007), (0.022, 0.779, 0.0), (0.0, 0.966, 0.0), (0.0, 1.0, 0.0)],
}
ROWS = [(value, delta, want) for value, row in TABLE.items() for delta, want in zip(DELTAS, row, strict=True)]


def shares(found: Tensor) -> tuple[float, float, float]:
    return float(found.mean()), float((found == 0).double().mean()), float((found == 1).double().mean())


@pytest.mark.parametrize(("value", "delta", "want"), ROWS)
def test_gates_are_distributed_as_published(value: float, delta: float, want: tuple[float, float, float]) -> None:
    """5.5, item 8: the mean and both ends, under noise that is spread evenly and under noise that is drawn."""
    count = 200_000
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0))
    assert shares(gate(torch.full_like(even, value), even, delta)) == pytest.approx(want, abs=2e-3)
    assert shares(gate(torch.full_like(drawn, value), drawn, delta)) == pytest.approx(want, abs=5e-3)


@pytest.mark.parametrize("delta", DELTAS)
def test_closed_forms_are_what_draws_come_to(delta: float) -> None:
    """5.5, item 8: P(M > 0), and P(M = 1) by symmetry, of many logits; with delta = 0 the form of arXiv 1712.01312."""
    even = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    found = gate(logits[:, None].expand(-1, len(even)), even, delta)
    torch.testing.assert_close(alive(logits, delta), (found > 0).double().mean(1), rtol=0, atol=2e-5)
    torch.testing.assert_close(alive(logits + 2 * ZERO, delta), (found == 1).double().mean(1), rtol=0, atol=2e-5)
    torch.testing.assert_close(alive(logits, 0.0), torch.sigmoid(logits - ZERO))
    random = torch.rand(25, 40_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = (gate(logits[:, None].expand_as(random), random, delta) > 0).double().mean(1)
    torch.testing.assert_close(alive(logits, delta), drawn, rtol=0, atol=4 * 0.5 / 200)  # four deviations


@pytest.mark.parametrize("delta", DELTAS)
def test_gradients_are_those_of_finite_differences_under_the_same_noise(delta: float) -> None:
    """5.5, item 8: of gates in between (zeta - gamma) s (1 - s) / alpha, of the others nothing; of the expected number."""
    u = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = torch.linspace(-5, 5, 500, dtype=torch.float64).requires_grad_()
    step = 1e-6
    for function in (lambda x: gate(x, u, delta), lambda x: gate(x, None, delta), lambda x: alive(x, delta)):
        values = function(logits)
        (found,) = torch.autograd.grad(values.sum(), logits)
        with torch.no_grad():
            up, down = function(logits + step), function(logits - step)
        inside = (up < 1) & (down > 0) & (up > 0) & (down < 1)  # no end between the two
        ends = ((up == 0) & (down == 0)) | ((up == 1) & (down == 1))
        torch.testing.assert_close(found[inside], ((up - down) / (2 * step))[inside], rtol=1e-5, atol=1e-7)
        assert not found[ends].any() and int(inside.sum()) > 50 and int((inside | ends).sum()) >= 498
    s = torch.sigmoid((torch.log(u + delta) - torch.log(1 - u + delta) + logits) / ALPHA).detach()
    (found,) = torch.autograd.grad(gate(logits, u, delta).sum(), logits)
    slope = torch.where((s * (ZETA - GAMMA) + GAMMA - 0.5).abs() < 0.5, (ZETA - GAMMA) * s * (1 - s) / ALPHA, 0.0)
    torch.testing.assert_close(found, slope)


def test_without_noise_the_gate_closes_at_its_zero() -> None:
    assert math.isclose(ZERO, -1.990, abs_tol=1e-3)
    near = torch.tensor([ZERO - 0.01, ZERO + 0.01, -ZERO - 0.01, -ZERO + 0.01])
    found = gate(near, None, 1e-8)
    assert found[0] == 0 and 0 < found[1] < 0.01 and 0.99 < found[2] < 1 and found[3] == 1
    half = torch.full_like(near, 0.5)
    assert torch.equal(found, gate(near, half, 1e-8))


@pytest.mark.parametrize("delta", DELTAS)
def test_the_noise_has_an_end_and_its_ends_give_numbers(delta: float) -> None:
    """torch.rand may be 0, and one 2^-24 less than 1: in single precision too nothing is infinite, nor is a gradient NaN."""
    u = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    logits = torch.zeros(4, requires_grad=True)
    found = gate(logits, u, delta)
    found.sum().backward()
    assert bool(found.isfinite().all()) and logits.grad is not None and bool(logits.grad.isfinite().all())
    end = math.log((1 + delta) / delta)
    lost = torch.tensor([ZERO - end - 0.01, -ZERO + end + 0.01])  # beyond the end always shut, always open
    if delta >= 0.1:
        every = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
        for value, always in zip(lost, (0.0, 1.0), strict=True):
            assert bool((gate(value.expand_as(every), every, delta) == always).all())
        assert alive(lost, delta).tolist() == [0.0, 1.0]


def test_the_expected_number_of_open_gates_is_a_number_however_far_they_are_shut() -> None:
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    found = alive(logits, 1e-8)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0, 1.0, 1.0] and logits.grad is not None and bool(logits.grad.isfinite().all())


def priced(logits: list[Tensor], prices: list[float], delta: float) -> float:
    """What gates are expected to save."""
    return sum(price * float((1 - alive(one.double(), delta)).sum()) for one, price in zip(logits, prices, strict=True))


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 0.999])
def test_shifted_gates_save_the_target(delta: float, share: float) -> None:
    """Whatever they were, all alike too, and however far."""
    drawn = torch.Generator().manual_seed(0)
    prices = [30.0, 4.0]
    for spread, start in ((1.0, 0.0), (5.0, -3.0), (0.0, 3.0), (0.0, -100.0), (30.0, 50.0)):
        logits = [start + spread * torch.randn(n, generator=drawn, dtype=torch.float64) for n in (4, 200)]
        target = share * (4 * 30.0 + 200 * 4.0)
        b = shift(logits, prices, target, delta)
        assert priced([one + b for one in logits], prices, delta) == pytest.approx(target, rel=1e-3)


def test_the_shift_has_the_gradient_of_the_solution() -> None:
    """By finite differences, where the noise has no end; with one gate more open the others shut by as much as it costs."""
    logits = [torch.linspace(-4, 1, 6, dtype=torch.float64), torch.linspace(-3, 3, 9, dtype=torch.float64)]
    prices, target, step = [30.0, 4.0], 100.0, 1e-4
    leaves = [one.clone().requires_grad_() for one in logits]
    b = shift(leaves, prices, target, 0.0)
    assert b.item() == pytest.approx(float(shift(logits, prices, target, 0.0)))
    b.backward()
    for k, one in enumerate(logits):
        for i in range(len(one)):
            ends = []
            for sign in (1, -1):
                moved = [x.clone() for x in logits]
                moved[k][i] += sign * step
                ends.append(float(shift(moved, prices, target, 0.0)))
            grad = leaves[k].grad
            assert grad is not None and float(grad[i]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)
    assert sum(float(one.grad.sum()) for one in leaves if one.grad is not None) == pytest.approx(-1.0)
    leaves = [one.clone().requires_grad_() for one in logits]
    shifted = [one + shift(leaves, prices, target, 0.0) for one in leaves]
    total = sum(price * alive(one, 0.0).sum() for one, price in zip(shifted, prices, strict=True))
    assert isinstance(total, Tensor)
    total.backward()  # the cost itself cannot be moved
    assert all(one.grad is not None and bool((one.grad.abs() < 1e-9).all()) for one in leaves)


@pytest.mark.parametrize("far", [1e8, 1e20])
def test_the_shift_of_gates_that_are_far_off_ends_too(far: float) -> None:
    """At learning rates that are far too high."""
    found = shift([torch.full((3,), far), torch.full((2,), -far)], [1.0, 1.0], 2.0, 1e-8)
    assert bool(found.isfinite()) and abs(float(found)) <= 2 * far


@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_gates_beyond_the_end_of_the_noise_pay_too(delta: float) -> None:
    """They are surely open or shut, and still what is shifted moves by them."""
    leaves = [torch.tensor([-9.0, -2.0, 5.0]).requires_grad_()]
    shift(leaves, [1.0], 1.5, delta).backward()
    assert leaves[0].grad is not None and bool((leaves[0].grad < 0).all())


def test_before_it_is_clipped_a_gate_has_a_gradient_everywhere() -> None:
    logits = torch.linspace(-8, 8, 33).requires_grad_()
    torch.testing.assert_close(stretched(logits).clamp(0, 1), gate(logits, None, 1e-8))
    (found,) = torch.autograd.grad(stretched(logits).sum(), logits)
    assert bool((found > 0).all()) and float(stretched(logits)[0].detach()) < 0 and float(stretched(logits)[-1].detach()) > 1
