from pathlib import Path

import pytest
from lissom.evaluate import _features
from lissom.tests.evaluate.judge import save_judge


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("zoo") / "tiny-judge")


@pytest.fixture(scope="session")
def judge(judge_folder: Path) -> _features.Features:
    return _features.load(f"local-dir:{judge_folder}")
