from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted search. Read only."""
    from lissom.tests.workflow import small  # not for tests that search nothing

    folder = tmp_path_factory.mktemp("runs") / "whole"
    small.search(folder)
    return folder
