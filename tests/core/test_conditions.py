"""What images are made from: rows in turn, and files that are refused line by line."""

from pathlib import Path

import pytest
from lissom.core.conditions import Conditions, read
from lissom.core.errors import UserError
from PIL import Image


def written(tmp_path: Path, text: str, name: str = "p.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_come_in_turn_so_that_a_balanced_file_gives_balanced_images() -> None:
    conditions = Conditions([{"prompt": p} for p in "abc"], "")
    assert conditions.arguments(range(2, 8)) == {"prompt": list("cabcab")}
    assert [conditions.caption(i) for i in (0, 4, 300)] == ["a", "b", "a"]


def test_notes_are_for_metrics_and_never_reach_the_pipeline() -> None:
    conditions = Conditions([{"class_labels": 3, "caption": "a dress", "label": 5}], "")
    assert conditions.arguments(range(2)) == {"class_labels": [3, 3]}
    assert conditions.caption(1) == "a dress" and conditions.label(1) == 5
    assert Conditions([{"class_labels": 3}], "").label(0) == 3 and Conditions([{}], "").caption(0) is None


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffa shoe\r\n\n  a bag, größer \n", "p.txt")
    assert read(path).rows == [{"prompt": "a shoe"}, {"prompt": "a bag, größer"}]


def test_lines_of_json_are_call_arguments(tmp_path: Path) -> None:
    found = read(written(tmp_path, '{"prompt": "a\u2028b"}\n\n{"prompt": "c"}\n'))
    assert [row["prompt"] for row in found.rows] == ["a\u2028b", "c"]


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    one = read(written(tmp_path, "a\nb\n", "a.txt"))
    two = read(written(tmp_path, '{"prompt": "a"}\n{"prompt": "b"}\n'))
    assert one.hash == two.hash != read(written(tmp_path, "b\na\n", "b.txt")).hash


def test_every_wrong_line_is_named_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a"}\nnot json\n[1]\n{"text": "b"}\n{"prompt": NaN}\n')
    with pytest.raises(UserError) as e:
        read(path)
    lines = str(e.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{path}:{n}" for n in (2, 3, 4, 5)]
    assert "['text'] differ from those of the first line, ['prompt']" in lines[2]


@pytest.mark.parametrize("content", [b"", b"\n \n", None, b"\xff\xfe\x00"])
def test_a_file_without_prompts_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.txt: "):
        read(path)


def test_images_of_a_row_are_opened_from_the_files_own_folder_and_are_part_of_the_hash(tmp_path):
    Image.new("L", (5, 4), 100).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x", "image": "a.png"}\n')
    conditions = read(path)
    before = conditions.hash
    (image,) = conditions.arguments(range(1))["image"]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 4), (100, 100, 100))
    Image.new("L", (5, 4), 101).save(tmp_path / "a.png")
    assert read(path).hash != before


def test_a_missing_or_broken_image_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"image": "broken.png"}\n{"image": "gone.png"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:1: broken.png(.|\n)*rows.jsonl:2: gone.png"):
        read(path)


def test_tensors_and_pictures_of_rows_are_joined_and_part_of_the_hash():
    import torch

    rows = [{"image_embeds": torch.full((1, 2), float(i)), "image": Image.new("RGB", (2, 2), (i, 0, 0))} for i in range(3)]
    conditions = Conditions(rows, "")
    made = conditions.arguments(range(2, 5))
    assert torch.equal(made["image_embeds"], torch.tensor([[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]))
    assert [picture.getpixel((0, 0))[0] for picture in made["image"]] == [2, 0, 1]
    again = [{"image_embeds": row["image_embeds"].clone(), "image": row["image"].copy()} for row in rows]
    assert Conditions(again, "").hash == conditions.hash
    for key, other in (("image_embeds", torch.zeros(1, 2)), ("image", Image.new("RGB", (2, 2), (9, 0, 0)))):
        assert Conditions([rows[0], {**rows[1], key: other}, rows[2]], "").hash != conditions.hash
