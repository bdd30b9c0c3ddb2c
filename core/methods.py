"""A method is a module: `autodiffusion` in a recipe means the file search/autodiffusion.py."""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from .errors import UserError, one_line

MAKES = {"distill": "loss"}  # what a method's function is called, where it is not called like its folder


def names(folder: str) -> list[str]:
    """Every method of a folder: its public modules and packages."""
    package = importlib.import_module(f"..{folder}", __package__)
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(folder: str, name: str) -> ModuleType:
    """The module of a method. A name with a dot is a user's own module, e.g. mylab.search.mine."""
    if "." in name:
        try:
            module = importlib.import_module(name)
        except Exception as e:  # a user's module may fail in any way
            raise UserError(
                f"{folder} method {name!r}: cannot import it ({type(e).__name__}: {one_line(e)}). It must be importable from here."
            ) from e
        makes = MAKES.get(folder, folder)
        if lacking := [part for part in ("Config", makes) if not hasattr(module, part)]:
            raise UserError(
                f"{folder} method {name!r}: the module has no {' and no '.join(lacking)}. A method is a Config and a function {makes}."
            )
        return module
    known = names(folder)
    if name not in known:
        there = f"there are {', '.join(known)}" if known else "there is none yet"
        raise UserError(f"no method {name!r} in {folder}/; {there}.{suggest(name, known)}")
    return importlib.import_module(f"..{folder}.{name}", __package__)


def presets() -> dict[str, Any]:
    """The named sums of losses of `lissom distill`."""
    found: dict[str, Any] = importlib.import_module("..distill._presets", __package__).PRESETS
    return found


def comments(module: ModuleType) -> dict[str, str]:
    """The comment beside each field of a method's Config, read from its file: the one place where a knob is explained.

    Fields of a Config that several methods share are explained where that is written.
    """
    ours = [c for c in reversed(module.Config.__mro__) if not c.__module__.startswith(("pydantic", "builtins"))]
    lines = [line for c in ours for line in inspect.getsource(c).splitlines()]
    found = (re.match(r"\s+(\w+):.*?#\s*(.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error message.

    >>> suggest("evolutoin", ["evolution", "random"])
    " Did you mean 'evolution'?"
    """
    close = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean {close[0]!r}?" if close else ""
