"""A method is a module, found by its file name."""

from pathlib import Path

import pytest
from lissom.core import methods
from lissom.core.errors import UserError


def test_every_public_file_is_a_method_and_no_other() -> None:
    folder = Path(methods.__file__).parents[1] / "search"
    assert methods.names("search") == sorted(p.stem for p in folder.glob("[!_]*.py"))


def test_an_unknown_method_is_answered_with_what_there_is() -> None:
    with pytest.raises(
        UserError, match=r"no method 'autodifusion' in search/; there are autodiffusion.* Did you mean 'autodiffusion'"
    ):
        methods.load("search", "autodifusion")
    with pytest.raises(UserError, match="no method '_space'"):
        methods.load("search", "_space")


def test_a_module_of_ones_own_is_loaded_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "mylab_methods"
    own.mkdir()
    (own / "__init__.py").touch()
    (own / "mine.py").write_text("class Config: ...\ndef search(task, config, rng): ...\n")
    (own / "half.py").write_text("class Config: ...\n")
    (own / "broken.py").write_text("def search(:\n")
    assert methods.load("search", "mylab_methods.mine").__file__ == str(own / "mine.py")
    with pytest.raises(UserError, match="the module has no search"):
        methods.load("search", "mylab_methods.half")
    for wrong in ("mylab_methods.broken", "mylab_methods.absent", ".relative"):
        with pytest.raises(UserError, match="cannot import it") as e:
            methods.load("search", wrong)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", methods.names("search"))
def test_every_knob_has_its_comment(name: str) -> None:
    module = methods.load("search", name)
    assert set(methods.comments(module)) == set(module.Config.model_fields)
