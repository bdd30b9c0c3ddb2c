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
