"""The losses on hand-made tensors, and what every loss file has to have."""

import pytest
import torch
from lissom.core import methods
from lissom.distill._seen import Seen, Site
from lissom.tests.distill.learning import term

A, B = Site("a", "x"), Site("b", "y")


def seen(**features: tuple[torch.Tensor, torch.Tensor]) -> Seen:
    student = torch.tensor([[1.0, 2.0, 9.0], [0.0, 0.0, 9.0]])
    return Seen(
        student,
        target=torch.tensor([[0.0, 0.0], [0.0, 2.0]]),
        teacher=student + torch.tensor([1.0, 0.0, 3.0]),
        features={{"a": A, "b": B}[name]: pair for name, pair in features.items()},
    )


def test_task_compares_the_noise_and_not_the_variance() -> None:
    assert term("task")(seen()).item() == pytest.approx((1 + 4 + 0 + 4) / 4)


def test_output_compares_the_variance_too() -> None:
    assert term("output")(seen()).item() == pytest.approx((1 + 0 + 9) / 3)


def test_features_are_summed_over_sites() -> None:
    found = seen(a=(torch.zeros(2, 4), torch.ones(2, 4)), b=(torch.zeros(2, 1, 3), torch.full((2, 1, 3), 2.0)))
    assert term("features", sites=(A, B))(found).item() == pytest.approx(1 + 4)
    assert term("self_attention", sites=(B,))(found).item() == pytest.approx(4)


def test_normalized_features_count_alike_whatever_their_scale() -> None:
    student, teacher = torch.zeros(2, 4), torch.tensor([[1.0, 2, 3, 4], [2.0, 2, 2, 2]])
    small, large = seen(a=(student, teacher)), seen(a=(student, 1000 * teacher))
    found = [term("normalized_features", sites=(A,))(one).item() for one in (small, large)]
    assert found == pytest.approx([1.0, 1.0])


def test_normalized_features_are_the_same_however_a_batch_is_split() -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 5, generator=g), torch.randn(4, 5, generator=g) * torch.tensor([1.0, 5, 10, 50])[:, None]
    whole = term("normalized_features", sites=(A,))(seen(a=(student, teacher)))
    parts = [term("normalized_features", sites=(A,))(seen(a=(student[i : i + 2], teacher[i : i + 2]))) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


def test_a_teacher_of_zeros_teaches_nothing_but_no_nan() -> None:
    found = term("normalized_features", sites=(A,))(seen(a=(torch.zeros(1, 4), torch.zeros(1, 4))))
    assert found.item() == 0.0


@pytest.mark.parametrize("name", methods.names("distill"))
def test_every_loss_is_a_config_and_a_function(name: str) -> None:
    module = methods.load("distill", name)
    assert module.Config.paper.startswith("https://arxiv.org/") and isinstance(module.taught, bool) and callable(module.loss)
    assert module.Config.model_config["extra"] == "forbid" and module.__doc__ and module.loss.__doc__


@pytest.mark.parametrize("name", methods.presets())
def test_every_preset_names_losses_that_exist(name: str) -> None:
    preset = methods.presets()[name]
    assert set(preset.losses) <= set(methods.names("distill")) and min(preset.losses.values()) > 0
    assert preset.paper.startswith("https://arxiv.org/")


def hidden(outlier: float = 0.0, samples: int = 2) -> torch.Tensor:
    """(B, N, C) with one activation far out in the first sample."""
    found = torch.randn(samples, 6, 8, generator=torch.Generator().manual_seed(0))
    found[0, 2, 3] += outlier
    return found


def masked(student: torch.Tensor, teacher: torch.Tensor, done: float = 0.0, **settings: object) -> float:
    one = seen(a=(student, teacher))
    one = Seen(one.student, one.target, one.teacher, one.features, done)
    return term("masked_features", sites=(A,), **settings)(one).item()


def test_masked_features_leave_out_what_is_far_from_its_own_sample() -> None:
    """Each by its own statistics: the teacher's outlier is zero to the student, whose own activation there is not."""
    student, teacher = hidden(), hidden(1e3)
    by_hand = []
    for s, t in zip(student, teacher, strict=True):
        ours = (s - s.mean()).abs() < 2 * s.std(unbiased=False)
        theirs = (t - t.mean()).abs() < 2 * t.std(unbiased=False)
        by_hand.append(((s * ours - t * theirs) ** 2).mean())
    assert masked(student, teacher) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)
    assert masked(student, teacher) < 1.0 < masked(student, teacher, mask="none")
    assert masked(student, teacher, mask="either") < masked(student, teacher)


def test_masked_features_use_the_statistics_of_each_sample_alone() -> None:
    student, teacher = hidden(), hidden() * torch.tensor([1.0, 100.0])[:, None, None]
    alone = [masked(student[i : i + 1], teacher[i : i + 1]) for i in (0, 1)]
    assert masked(student, teacher) == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_outliers_bring_no_nan_and_no_gradient_that_explodes() -> None:
    student = hidden().requires_grad_()
    one = seen(a=(student, hidden(1e3)))
    found = term("masked_features", sites=(A,))(one)
    found.backward()
    assert student.grad is not None and bool(torch.isfinite(student.grad).all()) and float(student.grad.abs().max()) < 1.0
    constant = torch.ones(1, 3, 4)
    assert masked(constant, constant) == 0.0  # nothing is less than zero deviations from the mean


def test_the_weight_of_masked_features_falls_to_zero() -> None:
    values = [masked(hidden(), 2 * hidden(), done) for done in (0.0, 0.25, 1.0)]
    assert values[1] == pytest.approx(0.75 * values[0]) and values[2] == 0.0
    assert masked(hidden(), 2 * hidden(), 1.0, decay=False) == pytest.approx(values[0])
