"""Images of other types as JPEG or PNG, held against what Pillow reads."""

import importlib
import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image, ImageOps, features

from pipelines.decode_torch import decode as decode_for_training
from shards.__main__ import main
from shards.counts import Counts
from shards.images.decode import MAX_PIXELS, decode, read_info
from shards.images.image_info import UndecodableError
from shards.images.other_types import find_other_type
from shards.images.reencode import Changes, convert_image
from shards.index import ShardIndex
from tests.shards.fuzz import encode, mutant, photo
from tests.shards.images.test_exif import exif_of

TYPES = {"GIF": "GIF", "BMP": "BMP", "PPM": "PPM", "TIFF": "TIFF", "JPEG2000": "JPEG 2000", "AVIF": "AVIF"}
FORMATS = [name for name in TYPES if name != "AVIF" or features.check("avif")]
PNG = Changes(convert="png")


def converted(data: bytes, changes: Changes = PNG, max_pixels: int = MAX_PIXELS) -> bytes:
    kind = find_other_type(data)
    assert kind is not None
    found, counts = convert_image(data, kind, changes, max_pixels)
    assert counts.converted == 1
    return found


def refused(data: bytes, **options: int) -> str:
    with pytest.raises(UndecodableError) as caught:
        converted(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert(mode))


@pytest.mark.parametrize("format", FORMATS)
def test_png_has_the_levels_that_pillow_reads(format: str) -> None:
    data = encode(photo(), format)
    assert find_other_type(data) == TYPES[format]
    found = converted(data)
    assert decode(found)[:3] == ("png", 45, 61)
    assert np.array_equal(decode_for_training(found).permute(1, 2, 0).numpy(), pillow(data))


@pytest.mark.parametrize("format", FORMATS)
def test_jpeg_has_the_asked_quality(format: str) -> None:
    data = encode(photo(), format)
    found = converted(data, Changes(quality=95, convert="jpeg"))
    assert found == encode(Image.fromarray(pillow(data)), "JPEG", quality=95, subsampling="4:2:0")


def clear() -> Image.Image:
    image = photo()
    image.putalpha(photo(seed=2).convert("L"))
    return image


@pytest.mark.parametrize(
    ("image", "options", "mode"),
    [
        (photo().convert("L"), {}, "L"),
        (photo().convert("1"), {}, "L"),
        (clear().convert("LA"), {}, "L"),
        (clear(), {}, "RGB"),
        (photo().convert("CMYK"), {}, "RGB"),
        (photo().quantize(64), {}, "RGB"),
        (photo(), {"compression": "tiff_lzw"}, "RGB"),
        (photo(), {"compression": "jpeg"}, "RGB"),
        (photo(), {"save_all": True, "append_images": [photo(30, 20, seed=1)]}, "RGB"),
    ],
    ids=["gray", "1-bit", "gray with alpha", "RGBA", "CMYK", "palette", "LZW", "JPEG", "two pages"],
)
def test_tiff_of_every_kind(image: Image.Image, options: dict[str, object], mode: str) -> None:
    data = encode(image, "TIFF", **options)
    with Image.open(io.BytesIO(converted(data))) as found:
        assert found.mode == mode
        assert np.array_equal(np.asarray(found), pillow(data, mode))


@pytest.mark.parametrize(
    ("data", "levels"),
    [
        (b"P5\n# gray\n2 2\n255\n\x01\x02\x03\x04", [[1, 2], [3, 4]]),
        (b"P2 2 2 255 1 2 3 4\n", [[1, 2], [3, 4]]),
        (b"P4\n2 2\n\x80\x40", [[0, 255], [255, 0]]),
        (b"P5\n2 2\n65535\n\x00\x01\x01\x00\xff\xff\x00\x00", [[1, 256], [65535, 0]]),
    ],
    ids=["PGM", "as text", "PBM", "16 bits"],
)
def test_netpbm_of_every_kind(data: bytes, levels: list[list[int]]) -> None:
    """The published folder reader takes .ppm and .pgm."""
    with Image.open(io.BytesIO(converted(data))) as found:
        assert np.asarray(found).tolist() == levels


def test_the_first_frame_of_a_gif_without_its_transparency() -> None:
    frames = [photo(seed=seed).quantize(32) for seed in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=5)
    assert np.array_equal(pillow(converted(data)), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("format", ["TIFF", "JPEG2000"])
@pytest.mark.parametrize("to", ["png", "jpeg"])
def test_sixteen_bits_stay_sixteen(format: str, to: str) -> None:
    levels = (np.arange(45 * 61).reshape(45, 61) * 20).astype(np.uint16)
    kinds = [levels] if format == "JPEG2000" else [levels, levels.astype(">u2"), levels.astype(np.int32)]
    for array in kinds:
        found = converted(encode(Image.fromarray(array), format), Changes(convert=to))
        assert decode(found)[:3] == ("png", 45, 61)
        with Image.open(io.BytesIO(found)) as image:
            assert np.array_equal(np.asarray(image), levels)


def test_levels_of_other_ranges_are_refused_with_the_numbers() -> None:
    levels = np.arange(100, dtype=np.int32).reshape(10, 10)
    assert refused(encode(Image.fromarray(levels - 3), "TIFF")).startswith("TIFF image of levels from -3 to 96.")
    assert "levels from 0 to 99000." in refused(encode(Image.fromarray(levels * 1000), "TIFF"))
    assert "of floating-point levels" in refused(encode(Image.fromarray(levels.astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("format", [name for name in FORMATS if name in ("TIFF", "AVIF")])
def test_the_orientation_is_kept_or_applied(format: str, upright: bool, orientation: int) -> None:
    data = encode(photo(), format, exif=exif_of(orientation))
    with Image.open(io.BytesIO(data)) as image:
        shown = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found, counts = convert_image(data, TYPES[format], Changes(upright=upright, convert="png"), MAX_PIXELS)
    with Image.open(io.BytesIO(found)) as image:
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(image)), shown)
    as_stored = upright or format == "TIFF"  # which Pillow turns in any case
    assert read_info(found).orientation == (1 if as_stored else orientation)
    assert counts == Counts(converted=1, turned_upright=int(upright and format == "AVIF" and orientation > 1))


@pytest.mark.parametrize("format", FORMATS)
def test_a_smaller_image_is_encoded_once(format: str) -> None:
    data = encode(photo(), format)
    small = Image.fromarray(pillow(data)).resize((27, 20), Image.Resampling.LANCZOS)
    found = converted(data, Changes(20, 90, convert="png"))
    assert found == encode(small, "JPEG", quality=90, subsampling="4:2:0")


@pytest.mark.parametrize("format", FORMATS)
def test_too_many_pixels_are_refused_by_the_header(format: str) -> None:
    assert refused(encode(photo(), format), max_pixels=45 * 61 - 1) == (
        f"61 x 45 pixels, {45 * 61} in total, more than the {45 * 61 - 1} of --max-pixels"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_refused_and_nothing_else_is_raised(format: str) -> None:
    files = [encode(photo(), format), encode(photo(20, 30, seed=1).convert("L"), format)]
    refused(files[0][: len(files[0]) // 3])
    outcomes: Counter[str] = Counter()
    for seed in range(150):
        data = mutant(seed, files)
        if kind := find_other_type(data):
            try:
                decode(convert_image(data, kind, PNG, 1 << 20)[0])
                outcomes["kept"] += 1
            except UndecodableError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 10


@pytest.mark.parametrize(
    ("data", "kind", "package"),
    [
        (b"\0\0\0\x20ftypheic" + bytes(40), "HEIF", "pillow-heif"),
        (b"\0\0\0\x20ftypmif1" + bytes(40), "HEIF", "pillow-heif"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "pillow-jxl-plugin"),
        (b"\xff\x0a" + bytes(40), "JPEG XL", "pillow-jxl-plugin"),
    ],
)
def test_a_missing_plugin_is_named(data: bytes, kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for format in ("JXL", "HEIF", "AVIF"):
        monkeypatch.delitem(Image.OPEN, format, raising=False)
    monkeypatch.setattr(Image, "init", lambda: True)
    assert find_other_type(data) == kind
    assert refused(data) == f"{kind} image, which Pillow reads only with {package}. Install that package"


def test_a_plugin_is_imported_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that reads what follows the first bytes as BMP."""

    class Reader(BmpImagePlugin.BmpImageFile):
        format = "JXL"

        def __init__(self, file: io.BytesIO, name: str) -> None:
            super().__init__(io.BytesIO(file.read()[2:]))

    whole_import = importlib.import_module

    def import_module(name: str) -> object:
        if name != "pillow_jxl":
            return whole_import(name)
        monkeypatch.setitem(Image.OPEN, "JXL", (Reader, None))
        return object()

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert np.array_equal(pillow(converted(b"\xff\x0a" + encode(photo(), "BMP"))), np.asarray(photo()))


def test_videos_and_other_types_are_not_images() -> None:
    for data in (b"\0\0\0\x20ftypisom" + bytes(40), b"%!PS-Adobe", b"P7\nWIDTH 1\n", b"Party", b"8BPS", b""):
        assert find_other_type(data) is None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number, (format, label) in enumerate(itertools.product([*FORMATS, "JPEG", "PNG", "WEBP"], "ab")):
        path = tmp_path / "src" / label / f"{number}.{ {'TIFF': 'TIF', 'JPEG2000': 'jp2'}.get(format, format.lower()) }"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(seed=number), format))
    (tmp_path / "src" / "a" / "cut.tif").write_bytes(encode(photo(), "TIFF")[:99])
    return tmp_path / "src"


@pytest.mark.parametrize("to", ["png", "jpeg"])
def test_pack_converts_and_the_manifest_says_so(
    source: Path, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [str(tmp_path / f"out{workers}") for workers in (1, 3)]
    for out, workers in zip(outs, (1, 3), strict=True):
        assert main(["pack", str(source), out, "--convert", to, "--shard-size", "20KB", "--workers", str(workers)]) == 0
        assert f"\n{2 * len(FORMATS)} images of other types converted\n" in capsys.readouterr().out
        assert main(["check", out, "--workers", "1"]) == 0
    manifests = [(Path(out) / "manifest.json").read_bytes() for out in outs]
    assert manifests[0] == manifests[1]
    with ShardIndex(outs[0]) as index:
        kinds = Counter(read_info(data).extension for data in index.read(range(len(index))))
        assert kinds == Counter({"jpg": 2, "png": 2, "webp": 2}) + Counter({to.replace("e", ""): 2 * len(FORMATS)})
        assert index.manifest.options["convert"] == to
        assert [entry.source for entry in index.manifest.rejected] == ["a/cut.tif"]
    capsys.readouterr()
    assert main(["info", outs[0]]) == 0
    assert f"converted   {2 * len(FORMATS)} images of other types than JPEG" in capsys.readouterr().out


def test_without_the_flag_they_are_left_out_and_it_is_named(source: Path, tmp_path: Path) -> None:
    assert main(["pack", str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    with ShardIndex(tmp_path / "out") as index:
        assert len(index) == 6
        reasons = [entry.reason for entry in index.manifest.rejected]
    assert len(reasons) == 2 * len(FORMATS) + 1
    assert all(reason.endswith("Pack with --convert to include it") for reason in reasons)
