"""A study of Optuna's that holds one kind of a search's trials: whether it is there, whose it is, and making it."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def there(backend: "BaseStorage", name: str) -> bool:
    """Whether there is such a study; nothing is written into a journal that may not be ours."""
    try:
        backend.get_study_id_from_name(name)
    except KeyError:
        return False
    return True


def create(backend: "BaseStorage", name: str, objectives: tuple[str, ...]) -> None:
    """A new study, unless somebody else was faster."""
    import optuna

    directions = [optuna.study.StudyDirection.MINIMIZE] * len(objectives)
    with suppress(optuna.exceptions.DuplicatedStudyError), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # metric names have been for years
        made = optuna.create_study(
            study_name=name, storage=backend, sampler=optuna.samplers.RandomSampler(0), directions=directions
        )
        made.set_metric_names(list(objectives))


def agree(stored: Mapping[str, str], identity: Mapping[str, str], place: str, worker: bool) -> None:
    """UserError names what two processes of one study differ in. A newer lissom may go on with what an older one began."""
    for key in identity:
        if key == "lissom" or stored.get(key) == identity[key]:
            continue
        if worker:
            raise UserError(
                f"{place}: this worker would measure something else: the search's {key} is {stored.get(key)}, "
                f"this worker's is {identity[key]}. Make them equal; results would not be comparable."
            )
        raise UserError(
            f"{place} belongs to another search: its {key} is {stored.get(key)}, this one's is {identity[key]}. "
            "Choose another --out folder, or give the settings it was started with."
        )
