"""Good, odd and bad image files, in folders and zips."""

import io
import os
import random
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from lissom.core.errors import UserError
from lissom.evaluate._images import UNREADABLE, Images, decode, half, rgb
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


def deep_rgb(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL reads but does not write: pixels uint16 (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def odd() -> dict[str, tuple[bytes, set[str]]]:
    """Readable images that are not plain 8-bit RGB: name, content, and what has to be converted."""
    flat, other = Image.new("RGB", (8, 8), (200, 40, 90)), Image.new("RGB", (8, 8), (1, 2, 3))
    clear = flat.convert("P")
    clear.info["transparency"] = 0
    return {
        "animated.gif": (encode(flat, "gif", save_all=True, append_images=[other]), {"animated", "palette"}),
        "animated.png": (encode(flat, "png", save_all=True, append_images=[other]), {"animated"}),
        "animated.webp": (encode(flat, "webp", save_all=True, append_images=[other]), {"animated"}),
        "pages.tiff": (encode(flat, "tiff", save_all=True, append_images=[other]), {"animated"}),
        "still.gif": (encode(flat, "gif"), {"palette"}),
        "rgba.png": (encode(flat.convert("RGBA")), {"alpha"}),
        "la.png": (encode(Image.fromarray(RAMP).convert("LA")), {"alpha", "grayscale"}),
        "clear.png": (encode(clear, transparency=0), {"alpha", "palette"}),
        "cmyk.jpg": (encode(flat.convert("CMYK"), "jpeg"), {"cmyk"}),
        "grey.jpg": (encode(Image.fromarray(RAMP), "jpeg"), {"grayscale"}),
        "bits.png": (encode(Image.new("1", (8, 8), 1)), {"grayscale"}),
        "palette.png": (encode(flat.convert("P")), {"palette"}),
        "deep.png": (encode(Image.fromarray(RAMP.astype(np.uint16) * 257)), {"16-bit", "grayscale"}),
        "deep-rgb.png": (deep_rgb(np.stack([RAMP] * 3, 2).astype(np.uint16) * 257), {"16-bit"}),
        "plain.png": (encode(flat), set()),
        "plain.jpg": (encode(flat, "jpeg"), set()),
    }


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


@pytest.mark.parametrize("name", odd())
def test_what_is_converted_is_said(name: str) -> None:
    content, kinds = odd()[name]
    pixels, found = decode(content)
    assert set(found) == kinds and len(found) == len(kinds)
    assert pixels.shape == (8, 8, 3) and torch.equal(pixels, rgb(content))


def test_deep_colour_is_scaled() -> None:
    assert np.array_equal(read(odd()["deep-rgb.png"][0]), np.stack([RAMP] * 3, 2))


def test_conversions_are_counted(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=2)
    for name, (content, _) in odd().items():
        (folder / name).write_bytes(content)
    (folder / "torn.gif").write_bytes(odd()["animated.gif"][0][:-40])  # the second frame is gone, the first is whole
    counts = {"animated": 4, "alpha": 3, "16-bit": 2, "cmyk": 1, "grayscale": 4, "palette": 5}
    for source in (Images(folder), Images(zipped(folder, [p.name for p in folder.iterdir()]))):
        assert len(list(source)) == 2 + len(odd()) + 1 and source.skipped == []
        assert source.converted == counts | {"animated": source.converted["animated"]}
        assert source.converted["animated"] in (4, 5)  # the torn one: as PIL sees it
    halves = Images(folder, "search"), Images(folder, "report")
    assert sum(len(list(half)) for half in halves) == 2 + len(odd()) + 1
    assert halves[0].converted + halves[1].converted == source.converted


def test_damage_anywhere_is_found_by_what_it_raises() -> None:
    """Or it does not matter: bytes changed and ends cut off by chance."""
    rng = random.Random(0)
    for content, _ in odd().values():
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 2, 4))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            with suppress(*UNREADABLE):
                decode(bytes(damaged[: rng.randrange(len(damaged)) if rng.random() < 0.3 else None]))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a", n=3)
    strange = os.fsencode(folder) + b"/\xff\xfe.png"
    try:
        with open(strange, "wb") as f:
            f.write(b"")
    except OSError:
        pytest.skip("this file system has text names only")
    source = Images(folder)
    assert len(list(source)) == 3 and source.skipped == ["\\xff\\xfe.png"]
    assert [stamp[0] for stamp in source.signature()][-1] == "\\xff\\xfe.png"


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
