"""The contact sheet of `make-shards show`."""

import hashlib
import io
import os
import tracemalloc
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.decode_torch import decode
from shards.errors import UserError
from shards.index import ShardIndex
from shards.inspect.sheet_cells import CAPTION, GAP
from shards.inspect.show import draw_contact_sheet, save_sheet
from shards.layout import BLOCK, RECORD, make_padding, make_tar_header
from shards.manifest import Manifest, Shard

SIDE = 64
EXIF_TURNED = 6


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Large soft spots of any color in any 8-bit mode."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, bands), dtype=np.uint8)
    return Image.frombytes(mode, (4, 3), small.tobytes()).resize((width, height), Image.Resampling.BICUBIC)


def folder_of(folder: Path, images: Sequence[bytes], labels: Sequence[int], classes: tuple[str, ...]) -> ShardIndex:
    """Images as they are, decodable or not, in one shard."""
    folder.mkdir()
    records = np.zeros(len(images), RECORD)
    tar = b""
    for number, (data, label) in enumerate(zip(images, labels, strict=True)):
        tar += make_tar_header(f"{number:09d}-x.jpg", len(data))
        records[number] = (0, len(tar), len(data), 30, 40, label, zlib.crc32(data))
        tar += data + make_padding(len(data))
    tar += bytes(2 * BLOCK)
    (folder / "train-000000.tar").write_bytes(tar)
    np.save(folder / "index.npy", records)
    manifest = Manifest(
        name="train",
        fingerprint="ab" * 32,
        samples=len(records),
        classes=classes,
        options={},
        shards=(Shard("train-000000.tar", len(records), len(tar), "cd" * 32),),
        index_sha256=hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest(),
        ignored=0,
        rejected=(),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return ShardIndex(folder)


@pytest.fixture
def colors(tmp_path: Path) -> ShardIndex:
    """A hundred images, each of one color of its own."""
    images = [encoded(Image.new("RGB", (8, 8), (100 + id, 2 * id, 50))) for id in range(100)]
    return folder_of(tmp_path / "colors", images, [id % 3 - 1 for id in range(100)], ("cat", "dog"))


def cell(sheet: Image.Image, place: int, columns: int, side: int = SIDE) -> np.ndarray:
    """The pixels of a cell, without its caption."""
    row, column = divmod(place, columns)
    left, top = GAP + column * (side + GAP), GAP + row * (side + CAPTION + GAP)
    return np.asarray(sheet)[top : top + side, left : left + side]


def caption(sheet: Image.Image, place: int, columns: int, side: int = SIDE) -> np.ndarray:
    row, column = divmod(place, columns)
    left, top = GAP + column * (side + GAP), GAP + row * (side + CAPTION + GAP) + side
    return np.asarray(sheet)[top : top + CAPTION, left : left + side]


def shown_ids(sheet: Image.Image, columns: int, cells: int) -> list[int]:
    """Which of `colors` are on a sheet."""
    middle = SIDE // 2
    pixels = [cell(sheet, place, columns)[middle, middle] for place in range(cells)]
    assert all((red - 100) * 2 == green and blue == 50 for red, green, blue in np.array(pixels, int).tolist())
    return [int(pixel[0]) - 100 for pixel in pixels]


def test_cells_are_the_images_as_training_decodes_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = EXIF_TURNED
    translucent = noise(5, 90, 50, "RGBA")
    gray16 = Image.fromarray(np.linspace(0, 65535, 60 * 50).astype(np.uint16).reshape(50, 60))
    transparent = noise(6, 64, 64).quantize(16)
    images = [
        encoded(noise(0, 120, 80), "JPEG"),
        encoded(noise(1, 20, 33), "JPEG", exif=exif),
        encoded(noise(2, 64, 64, "L"), "JPEG"),
        encoded(noise(3, 100, 300, "CMYK"), "JPEG"),
        encoded(translucent),
        encoded(translucent, "WEBP", lossless=True),
        encoded(gray16),
        encoded(transparent, transparency=bytes(range(16))),
        encoded(noise(7, 500, 3)),
        encoded(noise(8, 1, 1)),
    ]
    sheet = draw_contact_sheet(folder_of(tmp_path / "s", images, [0] * len(images), ("a",)), 99, 0, SIDE)
    for place, data in enumerate(images):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of transparent palettes
            levels = decode(data).permute(1, 2, 0).numpy()
        size = (SIDE, 1) if place == 8 else (SIDE, SIDE)  # `contain` would leave no pixel of it
        image = Image.fromarray(levels)
        expected = image.resize(size, 3) if place == 8 else ImageOps.contain(image, size, Image.Resampling.BICUBIC)
        found = cell(sheet, place, 4)
        top, left = (SIDE - expected.height) // 2, (SIDE - expected.width) // 2
        window = (slice(top, top + expected.height), slice(left, left + expected.width))
        np.testing.assert_array_equal(found[window], np.asarray(expected), f"image {place}")
        around = np.ones((SIDE, SIDE), bool)
        around[window] = False
        assert len(np.unique(found[around].reshape(-1, 3), axis=0)) <= 1


def test_a_seed_draws_the_same_samples_again_and_another_draws_others(colors: ShardIndex) -> None:
    sheet = draw_contact_sheet(colors, 20, 7, SIDE)
    assert sheet.tobytes() == draw_contact_sheet(colors, 20, 7, SIDE).tobytes()
    drawn = [tuple(shown_ids(draw_contact_sheet(colors, 20, seed, SIDE), 5, 20)) for seed in range(30)]
    assert len(set(drawn)) == 30
    for ids in drawn:
        assert len(set(ids)) == 20
        assert list(ids) == sorted(ids)
    assert len({id for ids in drawn for id in ids}) > 95  # any sample may be drawn


@pytest.mark.parametrize("count", [100, 101, 10**12])
def test_all_are_shown_where_there_are_no_more(colors: ShardIndex, count: int) -> None:
    assert shown_ids(draw_contact_sheet(colors, count, 0, SIDE), 10, 100) == list(range(100))


@pytest.mark.parametrize(
    ("count", "side", "columns", "rows"),
    [
        (1, 160, 1, 1),
        (2, 160, 2, 1),
        (3, 160, 2, 2),
        (36, 160, 6, 6),
        (100, 160, 9, 12),
        (60, 300, 5, 12),
        (2, 2000, 1, 2),
    ],
)
def test_the_grid_is_near_a_square_and_not_too_wide(
    colors: ShardIndex, count: int, side: int, columns: int, rows: int
) -> None:
    sheet = draw_contact_sheet(colors, count, 0, side)
    assert sheet.size == (GAP + columns * (side + GAP), GAP + rows * (side + CAPTION + GAP))
    assert sheet.width <= max(1600, side + 2 * GAP)


def test_samples_that_do_not_read_or_decode_show_why(tmp_path: Path) -> None:
    whole = encoded(noise(0, 50, 50), "JPEG")
    images = [whole, whole[:200], b"<html>", whole, whole]
    index = folder_of(tmp_path / "s", images, [0] * 5, ("a",))
    with (tmp_path / "s" / "train-000000.tar").open("r+b") as file:
        file.seek(int(index.records[3]["offset"]) + 90)
        file.write(b"damaged")
    sheet = draw_contact_sheet(index, 5, 0, 160)
    assert sheet.tobytes() == draw_contact_sheet(index, 5, 0, 160).tobytes()
    cells = [cell(sheet, place, 3, 160) for place in range(5)]
    np.testing.assert_array_equal(cells[0], cells[4])
    for broken in cells[1:4]:
        red, green, blue = broken.reshape(-1, 3).astype(int).T
        assert np.count_nonzero((red > 150) & (green < 60) & (blue < 60)) > 100  # letters
        assert np.count_nonzero((red == green) & (green == blue)) > 20_000  # on gray
    assert not np.array_equal(cells[1], cells[3])  # each its own reason


def test_storage_that_does_not_answer_shows_in_the_cells(colors: ShardIndex) -> None:
    before = draw_contact_sheet(colors, 4, 0, SIDE)
    colors.close()
    (colors.folder / "train-000000.tar").unlink()
    after = draw_contact_sheet(colors, 4, 0, SIDE)
    np.testing.assert_array_equal(caption(after, 0, 2), caption(before, 0, 2))
    assert not np.array_equal(cell(after, 0, 2), cell(before, 0, 2))


def test_captions_name_the_class_and_an_unlabeled_sample_has_its_number_alone(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (8, 8)))
    index = folder_of(tmp_path / "s", [data] * 4, [0, 1, 0, -1], ("cat", "dog"))
    sheet = draw_contact_sheet(index, 4, 0, SIDE)
    first, second, third, bare = (caption(sheet, place, 2) for place in range(4))
    line = CAPTION // 2
    assert not np.array_equal(first[:line], second[:line])
    np.testing.assert_array_equal(first[:line], third[:line])
    assert not np.array_equal(first[line:], third[line:])
    assert (bare[line:] == 255).all()
    assert not (bare[:line] == 255).all()


@pytest.mark.parametrize(
    "name",
    ["猫", "кошка", "🙂🙂", "a\nb\x1b[31m", "\udce9t\udce9", "ا" * 500, "W" * 500, "", " ", "x\u0301" * 40, "\0"],
)
def test_class_names_of_any_kind_are_drawn_inside_their_cell(tmp_path: Path, name: str) -> None:
    data = encoded(Image.new("RGB", (8, 8)))
    sheet = draw_contact_sheet(folder_of(tmp_path / "s", [data, data], [0, -1], (name,)), 2, 0, SIDE)
    pixels = np.asarray(sheet)
    gap = pixels[:, GAP + SIDE : GAP + SIDE + GAP]
    assert (gap == 255).all()
    assert (pixels[-GAP:] == 255).all()
    drawn = not (caption(sheet, 0, 2)[: CAPTION // 2] == 255).all()
    assert drawn == bool(name.strip(" "))


def test_names_that_differ_in_foreign_letters_look_different(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (8, 8)))
    sheet = draw_contact_sheet(folder_of(tmp_path / "s", [data, data], [0, 1], ("猫", "犬")), 2, 0, 160)
    assert not np.array_equal(caption(sheet, 0, 2, 160)[:18], caption(sheet, 1, 2, 160)[:18])


class Endless:
    """A billion samples of one image."""

    labels = widths = heights = np.broadcast_to(np.int32(0), 10**9)
    classes = ("a",)

    def __len__(self) -> int:
        return 10**9

    def read(self, ids: Sequence[int]) -> list[bytes]:
        return [encoded(Image.new("RGB", (8, 8)))] * len(ids)


def test_a_billion_samples_cost_what_a_hundred_do() -> None:
    tracemalloc.start()
    try:
        draw_contact_sheet(Endless(), 9, 0, SIDE)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8e6


def test_a_saved_sheet_is_that_sheet(tmp_path: Path) -> None:
    sheet = noise(0, 40, 30)
    save_sheet(sheet, tmp_path / "out.PNG")
    with Image.open(tmp_path / "out.PNG", formats=["PNG"]) as again:
        assert again.tobytes() == sheet.tobytes()
    assert os.listdir(tmp_path) == ["out.PNG"]


@pytest.mark.parametrize("name", ["out.jpg", "out", "png", "out.png.gz", "a\n.txt"])
def test_only_png_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"--grid .* is a PNG file\. Use a name ending in \.png") as caught:
        save_sheet(noise(0, 4, 4), tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_refused_write_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("folder.png", "missing/out.png", "file/out.png", "n" * 300 + ".png"):
        with pytest.raises(UserError, match=r"cannot write .*\. Give --grid a file in a folder that exists") as caught:
            save_sheet(noise(0, 4, 4), tmp_path / path)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_a_write_that_fails_half_way_leaves_the_sheet_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = noise(0, 40, 30)
    save_sheet(sheet, tmp_path / "out.png")
    before = (tmp_path / "out.png").read_bytes()

    def run_full(self: Image.Image, path: Path, format: str) -> None:
        path.write_bytes(before[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", run_full)
    with pytest.raises(UserError, match=r"out\.png: No space left on device"):
        save_sheet(sheet, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["out.png"]
