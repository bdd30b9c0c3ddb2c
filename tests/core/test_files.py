"""Files appear whole or not at all, and folders that cannot be used are refused by name."""

import errno
import os
from pathlib import Path

import pytest
from lissom.core import files
from lissom.core.errors import DiskError, UserError


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "one\n")
    files.write_text(path, "zwei, größer\n")
    assert path.read_bytes() == "zwei, größer\n".encode() and os.listdir(path.parent) == ["a.txt"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, DiskError), (errno.EROFS, DiskError), (errno.EDQUOT, DiskError), (errno.EACCES, UserError)],
)
def test_a_failing_disk_is_one_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, code: int, kind: type[UserError]
) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "one")

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, fail)
        with pytest.raises(kind, match=r"a\.txt: cannot be written") as e:
            files.write_text(path, "two")
    assert type(e.value) is kind and e.value.exit_code == (1 if kind is DiskError else 2)
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_other_errors_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd"), files.disk_errors(tmp_path):
        raise OSError(errno.EIO, "odd")


def test_an_output_folder_is_new_empty_or_resumed(tmp_path: Path) -> None:
    files.prepare(tmp_path / "a" / "b", resume=False)
    files.prepare(tmp_path / "a" / "b", resume=False)
    (tmp_path / "a" / "b" / "c").touch()
    with pytest.raises(UserError, match="is not empty. Add --resume"):
        files.prepare(tmp_path / "a" / "b", resume=False)
    files.prepare(tmp_path / "a" / "b", resume=True)
    assert os.listdir(tmp_path / "a" / "b") == ["c"]


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_in_the_way_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Choose another --out"):
        files.prepare(tmp_path / "file" / below, resume=True)


def test_a_target_is_checked_without_touching_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    files.check_target(tmp_path / "new" / "deep" / "a.json")
    files.check_target(tmp_path / "file")
    for wrong, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "is a file")):
        with pytest.raises(UserError, match=why):
            files.check_target(wrong)
    assert os.listdir(tmp_path) == ["file"]
