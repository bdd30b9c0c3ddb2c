"""Good, odd and bad image files, in folders and zips."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate._images import Images, half, rgb
from lissom.tests.evaluate.judge import images
from PIL import Image

RAMP = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))  # (8, 8) grey


def encode(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def fill(folder: Path, n: int = 6, size: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images(n, size=size)):
        (folder / f"{i:03}.png").write_bytes(encode(Image.fromarray(pixels.numpy())))
    return folder


def zipped(folder: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for name in names:
            archive.write(folder / name, name)
    return folder.with_suffix(".zip")


def read(content: bytes) -> np.ndarray:
    pixels = rgb(content)
    assert pixels.dtype == torch.uint8 and pixels.shape == (8, 8, 3)
    return pixels.numpy()


def test_grey_becomes_rgb() -> None:
    assert np.array_equal(read(encode(Image.fromarray(RAMP))), np.stack([RAMP] * 3, 2))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    for kind in ("png", "tiff"):
        assert np.array_equal(read(encode(deep, kind)), np.stack([RAMP] * 3, 2))


def test_alpha_is_dropped_as_cleanfid_does() -> None:
    rgba = np.dstack([images(1)[0].numpy(), RAMP])
    assert np.array_equal(read(encode(Image.fromarray(rgba))), rgba[:, :, :3])


def test_cmyk_palette_and_one_bit() -> None:
    flat = Image.new("RGB", (8, 8), (200, 40, 90))
    assert np.abs(read(encode(flat.convert("CMYK"), "tiff")).astype(int) - (200, 40, 90)).max() <= 1
    assert np.array_equal(read(encode(flat.convert("P"))), np.array(flat.convert("P").convert("RGB")))
    assert np.unique(read(encode(Image.new("1", (8, 8), 1)))).tolist() == [255]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = read(encode(frames[0], "gif", save_all=True, append_images=frames[1:]))
    assert np.array_equal(found, np.array(frames[0]))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        rgb(encode(Image.fromarray(RAMP.astype(np.float32)), "tiff"))


def test_order_is_by_name_in_folders_and_zips(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a")
    fill(folder / "deep" / "er", n=2, size=9)
    names = ["003.png", "deep/er/001.png", "000.png", "005.png", "001.png", "deep/er/000.png", "002.png", "004.png"]
    from_folder, from_zip = Images(folder), Images(zipped(folder, names))
    assert from_folder.names == from_zip.names == sorted(names)
    shapes = [tuple(pixels.shape) for pixels in from_folder]
    assert shapes == [(1, 8, 8, 3)] * 6 + [(1, 9, 9, 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(from_folder, from_zip, strict=True))


def test_what_is_no_image_is_not_counted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=2)
    (folder / "notes.txt").write_text("hello")
    (folder / "._000.png").write_bytes(b"resource fork")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "000.png").write_bytes(b"resource fork")
    (folder / "000.PNG").write_bytes((folder / "000.png").read_bytes())
    assert Images(folder).names == ["000.PNG", "000.png", "001.png"]


def test_bad_files_are_skipped_and_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=4)
    whole = encode(Image.fromarray(images(1, size=64)[0].numpy()))
    bad = {
        "empty.png": b"",
        "truncated.png": whole[: len(whole) // 2],
        "cut.jpg": encode(Image.new("RGB", (64, 64)), "jpeg")[:300],
    }
    bad |= {
        "text.jpg": b"<html>not found</html>",
        "short.gif": b"GIF89a",
        "zeros.png": b"\0" * 100,
        "bad.tiff": b"II*\0\xff\xff\xff\xff",
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    os.symlink(tmp_path / "nowhere", folder / "link.png")
    for source in (Images(folder), Images(zipped(folder, [*bad, "000.png", "001.png", "002.png", "003.png"]))):
        assert len(list(source)) == 4
        assert source.skipped == sorted({*bad, "link.png"} & set(source.names))


def test_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=3)
    path = zipped(folder, ["000.png", "001.png", "002.png"])
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF  # in the first member's bytes: its checksum no longer fits
    path.write_bytes(content)
    source = Images(path)
    assert len(list(source)) == 2 and source.skipped == ["000.png"]


@pytest.mark.parametrize("n, words", [(0, "0 images in it"), (1, "1 image in it")])
def test_too_few_files(tmp_path: Path, n: int, words: str) -> None:
    folder = fill(tmp_path / "a", n=n)
    with pytest.raises(UserError, match=f"{folder}: {words}, a reference needs at least 2"):
        Images(folder)
    with pytest.raises(UserError, match=words):
        Images(zipped(folder, [f"{i:03}.png" for i in range(n)]))


def test_too_few_readable(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=3)
    for name in ("000.png", "002.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{folder}: 1 of its 3 images can be read.*unreadable: 000.png, 002.png\)"):
        list(Images(folder))


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder or file"):
        Images(tmp_path / "missing")
    (tmp_path / "a.png").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="neither a folder nor a readable zip"):
        Images(tmp_path / "a.png")


def test_halves_share_no_image_and_miss_none(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=40)
    copy = (folder / "000.png").read_bytes()
    (folder / "again.bmp").write_bytes(encode(Image.open(io.BytesIO(copy)), "bmp"))  # the same pixels in another format
    found = {role: {p.numpy().tobytes() for p in Images(folder, role)} for role in ("search", "report")}
    assert len(found["search"]) + len(found["report"]) == 40 and not found["search"] & found["report"]
    assert min(map(len, found.values())) > 8
    assert all(half(p[0]) == "report" for p in Images(folder, "report"))


def test_a_half_that_is_too_small(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=2)
    with pytest.raises(UserError, match="of its 2 images fell to the half for (search|report), which needs at least 2"):
        for role in ("search", "report"):
            list(Images(folder, role))


def test_signature_follows_the_files(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a")
    before = Images(folder).signature()
    assert Images(folder).signature() == before
    os.utime(folder / "000.png", ns=(0, 1))
    assert Images(folder).signature() != before
