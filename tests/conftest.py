from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted search. Read only."""
    from lissom.tests.workflow import small  # not for tests that search nothing

    folder = tmp_path_factory.mktemp("runs") / "whole"
    small.search(folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads may share the sum of a matrix product, and then round it as they do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
