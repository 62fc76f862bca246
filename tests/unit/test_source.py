"""Betons and folders: what FFCV wrote is read alike; nothing that a stranger's file says is believed unchecked."""

import json
import logging
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.errors import DataError, UserError, printable
from pipelines.read.base import MAX_PIXELS
from pipelines.read.exif import orientation, turned
from pipelines.read.folder import EXTENSIONS, FolderSource
from pipelines.read.source import open_source
from tests.beton_tools import ROW, ROWS_START, Sample, encoded, jpeg_sample, pixels, raw_sample, write_beton

SAMPLES = [jpeg_sample(20, 31, 1, 0), raw_sample(5, 4, 0, 1), jpeg_sample(17, 9, 2, 2), jpeg_sample(8, 8, 1, 3)]


@pytest.fixture
def beton(tmp_path):
    return write_beton(tmp_path / "small.beton", SAMPLES)


def check_samples(source, samples):
    """The source says of every sample what it was made of, one at a time and in batches."""
    n = len(samples)
    everything = np.arange(n)[::-1]
    assert source.kind == "beton" and source.num_samples == n
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [s.label for s in samples]
    heights, widths = source.sizes(everything)
    assert heights.dtype == widths.dtype == np.int64
    assert list(zip(heights.tolist(), widths.tolist(), strict=True)) == [(s.height, s.width) for s in samples[::-1]]
    for index, sample in enumerate(samples):
        data = source.read(index)
        assert data.tobytes() == sample.data and not data.flags.writeable
        assert source.is_jpeg(index) == (sample.mode == 0)


def test_beton(beton):
    source = open_source(beton)
    check_samples(source, SAMPLES)
    assert source.path == str(beton)
    assert source.num_classes == 3 and source.class_names is None
    assert source.name(2) == f"{beton}: sample 2"


@pytest.mark.parametrize("extra", ["before", "after"])
def test_beton_by_ffcvs_writer(tmp_path, extra):
    """Any field order, other fields beside ours: the same rows, bytes and lengths as FFCV's own reader finds."""
    pytest.importorskip("ffcv", reason="needs FFCV: pip install 'std-fast[ffcv]'")
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter

    rows = [
        (pixels(30 + i, 40 - i, i), i % 3, 0.5, np.full(7, i, np.uint8), {"i": i}, np.full((2, 3), i, "<f4"))
        for i in range(5)
    ]
    names = ["image", "label", "weight", "blob", "note", "array"]
    fields = [
        RGBImageField(write_mode="smart", smart_threshold=3640),
        IntField(),
        FloatField(),
        BytesField(),
        JSONField(),
        NDArrayField(np.dtype("<f4"), (2, 3)),
    ]
    order = [1, 0] if extra == "after" else [5, 4, 2, 1, 3, 0]
    path = tmp_path / "ffcv.beton"
    writer = DatasetWriter(str(path), {names[i]: fields[i] for i in order}, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset([tuple(row[i] for i in order) for row in rows])

    source = open_source(path)
    reader = Reader(str(path))
    meta = reader.metadata[f"f{reader.field_names.index('image')}"]
    sizes = {int(entry["ptr"]): int(entry["size"]) for entry in reader.alloc_table}
    file = np.fromfile(path, np.uint8)
    expected = [
        Sample(file[p : p + sizes[p]].tobytes(), row[0].shape[0], row[0].shape[1], row[1], int(mode))
        for row, p, mode in zip(rows, meta["data_ptr"].astype(int).tolist(), meta["mode"], strict=True)
    ]
    assert {sample.mode for sample in expected} == {0, 1}
    check_samples(source, expected)
    for index, sample in enumerate(expected):
        if sample.mode:
            assert np.array_equal(source.read(index).reshape(rows[index][0].shape), rows[index][0])


# Places in a beton of SAMPLES: the header's, and those of row i and of entry j.
VERSION, FIELDS, PAGE, COUNT, TABLE = (0, "<H"), (2, "<H"), (4, "<I"), (8, "<Q"), (16, "<Q")


def row(i: int, part: str) -> tuple[int, str]:
    offset, format = {
        "mode": (0, "<B"),
        "width": (1, "<H"),
        "height": (3, "<H"),
        "pointer": (5, "<Q"),
        "label": (16, "<q"),
    }[part]
    return ROWS_START + ROW * i + offset, format


def entry(j: int, part: str) -> tuple[int, str]:
    start = ROWS_START + ROW * len(SAMPLES) + sum(len(s.data) for s in SAMPLES)
    return start + 24 * j + {"sample": 0, "pointer": 8, "size": 16}[part], "<Q"


def poke(path: Path, place: tuple[int, str], value: int | bytes) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(place[1], data, place[0], value)
    path.write_bytes(data)


POINTER_0 = ROWS_START + ROW * len(SAMPLES)
FAULTS = {
    "version": (VERSION, 1, "not an FFCV beton of version 2; make one"),
    "no fields": (FIELDS, 0, "not an FFCV beton"),
    "page of no power of two": (PAGE, 3 << 20, "not an FFCV beton"),
    "too many fields": (FIELDS, 65535, "too short .* for the 65535 fields"),
    "unfinished": (TABLE, 0, "never completed"),
    "no samples": (COUNT, 0, "holds no samples"),
    "samples beyond the file": (COUNT, 10**6, "announces 1000000 samples"),
    "absurd samples": (COUNT, 2**64 - 1, "announces 18446744073709551615 samples"),
    "samples into the table": (COUNT, len(SAMPLES) + 50, "sample 4 |outside"),
    "table beyond the file": (TABLE, 2**63, "allocation table .* outside the file"),
    "table in the metadata": (TABLE, ROWS_START, "allocation table .* outside the file"),
    "table off by one": (TABLE, entry(0, "sample")[0] + 1, "allocation table .* cut off"),
    "table lacks an entry": (TABLE, entry(1, "sample")[0], "sample 0 .* is not in the allocation table"),
    "table empty": (TABLE, entry(4, "sample")[0], "allocation table is empty"),
    "custom field": ((24, "<B"), 255, "field 'image' is of a custom type"),
    "unknown field": ((24, "<B"), 77, "field 'image' is of a custom type"),
    "no image": ((25, "<16s"), b"picture", r"lacks a field 'image'.*fields: picture, label"),
    "label of another type": ((24 + 1041, "<B"), 0, "lacks a field 'label' of FFCV's IntField"),
    "two fields of one name": ((24 + 1041 + 1, "<16s"), b"image", "two fields named 'image'"),
    "mode": (row(2, "mode"), 7, "sample 2 is stored in a mode"),
    "no width": (row(1, "width"), 0, "sample 1 has no height or no width"),
    "no height": (row(3, "height"), 0, "sample 3 has no height or no width"),
    "absurd width": (row(0, "width"), 65501, "sample 0 claims more pixels than any image"),
    "raw of another size": (row(1, "height"), 6, "sample 1 is raw, but its length"),
    "negative label": (row(3, "label"), -1, "sample 3 has a label outside"),
    "absurd label": (row(3, "label"), 2**62, "sample 3 has a label outside"),
    "pointer outside": (row(2, "pointer"), 2**64 - 8, "sample 2 has data at an address"),
    "pointer into the header": (row(2, "pointer"), 0, "sample 2 has data at an address"),
    "pointer of another": (row(2, "pointer"), POINTER_0, "sample 2 has data that .* another sample"),
    "allocation before the data": (entry(0, "pointer"), 24, "1 of its allocations lie outside"),
    "allocation beyond the data": (entry(3, "pointer"), 2**64 - 1, "1 of its allocations lie outside"),
    "allocation too long": (entry(3, "size"), len(SAMPLES[3].data) + 1, "1 of its allocations lie outside"),
    "allocation that wraps": (entry(0, "size"), 2**64 - POINTER_0, "1 of its allocations lie outside"),
    "overlap": (entry(0, "size"), len(SAMPLES[0].data) + 1, "overlap"),
    "no data": (entry(3, "size"), 0, "sample 3 has data at an address that is not in"),
    "entry of another sample": (entry(2, "sample"), 9, "sample 2 has data that .* another sample"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_crafted_beton_is_refused_by_name(beton, fault):
    place, value, message = FAULTS[fault]
    poke(beton, place, value)
    with pytest.raises(UserError, match=message) as caught:
        open_source(beton)
    text = str(caught.value)
    assert text.startswith(str(beton)) and "std-fast convert" in text and "\n" not in text


def test_a_bomb_is_refused(beton):
    """A few bytes that would have a decoder reserve gigabytes."""
    poke(beton, row(0, "width"), 20000)
    poke(beton, row(0, "height"), MAX_PIXELS // 20000 + 1)
    with pytest.raises(DataError, match="sample 0 claims more pixels than any image"):
        open_source(beton)


def test_every_truncation_is_refused(beton):
    content = beton.read_bytes()
    for size in [*range(0, len(content), 211), *range(len(content) - 100, len(content))]:
        beton.write_bytes(content[:size])
        with pytest.raises(UserError, match="std-fast convert"):
            open_source(beton)


def test_a_beton_that_shrinks_while_open_is_noticed(beton):
    source = open_source(beton)
    os.truncate(beton, 4096)
    for use in (lambda: source.read(3), source.fingerprint):
        with pytest.raises(DataError, match="became shorter"):
            use()


def test_a_beton_may_be_unlinked_while_open(beton):
    source = open_source(beton)
    beton.unlink()
    check_samples(source, SAMPLES)


def test_fingerprint_of_a_beton(beton, tmp_path):
    first = open_source(beton).fingerprint()
    assert open_source(write_beton(tmp_path / "other name", SAMPLES)).fingerprint() == first
    for other in (SAMPLES[:3], SAMPLES[::-1], [*SAMPLES[:3], raw_sample(8, 8, 1, 3)]):
        assert open_source(write_beton(tmp_path / "other", other)).fingerprint() != first
    poke(beton, row(0, "label"), 2)
    assert open_source(beton).fingerprint() != first


def test_manifest_names_the_classes(beton):
    manifest = Path(f"{beton}.json")
    manifest.write_text(json.dumps({"classes": ["cat", "chien", "犬", "unused"]}))
    source = open_source(beton)
    assert source.class_names == ["cat", "chien", "犬", "unused"] and source.num_classes == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"classes": ["a", "b"]}', "names 2 classes, but the beton has label 2"),
        (b'{"classes": ["a", "b", "a"]}', "list of different names"),
        (b'{"classes": ["a", "b", 3]}', "list of different names"),
        (b'{"classes": {"a": 1}}', "list of different names"),
        (b'{"classes": ["a", "b", "c"], "shard": [3, 3]}', "`shard` must be"),
        (b'{"classes": ["a", "b", "c"], "shard": {"0": 1}}', "`shard` must be"),
        (b'{"class": []}', "KeyError"),
        (b"[1]", "TypeError"),
        (b"", "not a manifest"),
        (b"\xff\xfe", "not a manifest"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_manifest_is_refused(beton, content, message):
    Path(f"{beton}.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_source(beton)
    assert f"{beton}.json" in str(caught.value) and "delete it" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["list", "glob"])
def test_several_betons_are_one_dataset(tmp_path, way):
    parts = [SAMPLES[:2], SAMPLES[2:3], SAMPLES[3:]]
    paths = [write_beton(tmp_path / f"part-{i}.beton", part) for i, part in enumerate(parts)]
    for path in paths:
        Path(f"{path}.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    source = open_source(paths if way == "list" else f"{tmp_path}/part-*")
    check_samples(source, SAMPLES)
    assert source.class_names == ["a", "b", "c"] and source.num_classes == 3
    assert source.name(2) == f"{paths[1]}: sample 0" and source.name(3) == f"{paths[2]}: sample 0"
    other_order = open_source(paths[::-1])
    assert other_order.labels.tolist() == [1, 2, 1, 0]
    assert len({source.fingerprint(), other_order.fingerprint(), open_source(paths[:2]).fingerprint()}) == 3
    assert open_source(paths[:1]).fingerprint() == open_source(paths[0]).fingerprint()


def test_betons_that_do_not_belong_together(tmp_path):
    paths = [write_beton(tmp_path / f"{i}.beton", SAMPLES) for i in range(2)]
    assert open_source(paths).num_classes == 3
    with pytest.raises(UserError, match="0.beton: given twice"):
        open_source([paths[0], tmp_path / "." / "0.beton"])
    Path(f"{paths[1]}.json").write_text(json.dumps({"classes": ["a", "b", "c"]}))
    with pytest.raises(UserError, match="1.beton: other classes than .*0.beton"):
        open_source(paths)


def shards(folder, *manifests):
    """Betons of two samples each with these manifests; None: without one."""
    paths = []
    for place, manifest in enumerate(manifests):
        samples = [jpeg_sample(9, 8, 0, 2 * place), jpeg_sample(9, 8, 1, 2 * place + 1)]
        paths.append(write_beton(folder / f"{place}.beton", samples))
        if manifest is not None:
            Path(f"{paths[-1]}.json").write_text(json.dumps({"classes": ["a", "b"], **manifest}))
    return paths


def test_all_shards_of_a_conversion_are_one_dataset(tmp_path, caplog):
    paths = shards(
        tmp_path,
        *({"shard": [i, 3], "settings": {"size": 64}, "conversion": {"id": "x", "part": i}} for i in (2, 0, 1)),
    )
    assert open_source(paths).num_samples == 6
    assert not caplog.records
    pattern = re.escape(str(tmp_path / "*.beton"))
    with pytest.raises(UserError, match=f"0.beton: shard 2/3 of .* give all 3: '{pattern}', or set data.one_part true"):
        open_source(paths[0])
    assert open_source(str(tmp_path / "*.beton")).num_samples == 6
    assert open_source(paths[0], one_part=True).num_samples == 2
    paths[1].unlink()
    with pytest.raises(UserError, match=r"give all 3 by a pattern with \*"):
        open_source(paths[0])


@pytest.mark.parametrize(
    ("manifests", "message"),
    [
        ([{"shard": [0, 3]}, {"shard": [1, 3]}], "0.beton: shard 2/3 of its conversion is not given; give all 3"),
        ([{"shard": [0, 2]}, {"shard": [1, 2]}, {"shard": [1, 2]}], "2.beton: shard 1/2, and so is .*1.beton"),
        ([{"shard": [0, 1]}, {"shard": [0, 1]}], "1.beton: shard 0/1, and so is .*0.beton"),
        ([{"shard": [0, 2]}, {"shard": [1, 3]}], "1.beton: shard 1/3 of another conversion than .*0.beton"),
        ([{"shard": [i, 2], "settings": {"size": 64 + i}} for i in (0, 1)], "1.beton: shard 1/2 of another conversion"),
        ([{"shard": [i, 2], "conversion": {"id": str(i)}} for i in (0, 1)], "1.beton: shard 1/2 of another conversion"),
        ([{"shard": [0, 2]}, {}], "1.beton: has no manifest .* that names its part"),
    ],
)
def test_shards_that_are_not_one_conversion_are_refused(tmp_path, manifests, message):
    paths = shards(tmp_path, *manifests)
    with pytest.raises(UserError, match=message) as caught:
        open_source(paths)
    assert "\n" not in str(caught.value)


def test_betons_without_manifests_are_joined_with_a_warning(tmp_path, caplog):
    open_source(shards(tmp_path, None, None))
    assert "0.beton and 1 more: without manifests" in caplog.text


def test_fingerprints_do_not_depend_on_the_path(tmp_path, folder):
    (tmp_path / "parts").mkdir()
    parts = shards(tmp_path / "parts", {"shard": [0, 2]}, {"shard": [1, 2]})
    shutil.copytree(tmp_path, tmp_path / "moved")
    for path in (folder, parts):
        moved = [tmp_path / "moved" / one.relative_to(tmp_path) for one in (path if path is parts else [path])]
        assert open_source(path).fingerprint() == open_source(moved if path is parts else moved[0]).fingerprint()
    (folder / "b/2.png").write_bytes(encoded(pixels(6, 10), "PNG"))
    assert open_source(folder).fingerprint() != open_source(tmp_path / "moved" / folder.name).fingerprint()


def test_nothing_to_open(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "missing", "missing: cannot be opened .No such file"),
        (tmp_path / "pipe", "pipe: cannot be opened .not a regular file"),
        (tmp_path / "x*.beton", "no file matches"),
        (tmp_path.parent / f"{tmp_path.name[:-1]}*", f"matches the folder {tmp_path}; a pattern names betons"),
        ("nul\0byte", r"nul\\x00byte: cannot be opened"),
        (f"{tmp_path},{tmp_path}", "name several betons by one pattern"),
        ([], "the list of betons is empty"),
        ([tmp_path], "cannot be opened"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            open_source(path)
        assert re.search("give|name", str(caught.value))


# ---------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    files = {
        "b/2.png": encoded(pixels(6, 9), "PNG"),
        "b/10.JPG": encoded(pixels(7, 5)),
        "a é/ünï.jpeg": encoded(pixels(12, 8)),
        "c/not what it says.jpg": encoded(pixels(4, 3), "PNG"),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_folder(folder, caplog):
    (folder / ".hidden").mkdir()
    (folder / "b" / ".3.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        source = open_source(folder)
    assert not caplog.records
    assert source.kind == "folder" and source.path == str(folder)
    assert source.class_names == ["a é", "b", "c"] and source.num_classes == 3
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 1, 1, 2]
    assert [source.name(i) for i in range(4)] == [
        f"{folder}/{f}" for f in ("a é/ünï.jpeg", "b/10.JPG", "b/2.png", "c/not what it says.jpg")
    ]
    assert source.read(1).tobytes() == (folder / "b/10.JPG").read_bytes()
    assert [source.is_jpeg(i) for i in range(4)] == [True, True, False, False]
    heights, widths = source.sizes(np.array([3, 0, 1, 2]))
    assert heights.tolist() == [4, 12, 7, 6] and widths.tolist() == [3, 8, 5, 9]


def test_sizes_are_read_once(folder):
    source = open_source(folder)
    source.sizes(np.array([1]))
    (folder / "b/10.JPG").unlink()
    assert [int(v[0]) for v in source.sizes(np.array([1]))] == [7, 5]
    with pytest.raises(DataError, match="10.JPG: not a readable image .No such file.*; replace or remove it"):
        source.read(1)
    with pytest.raises(DataError, match="10.JPG"):
        source.fingerprint()


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_every_extension_is_read(tmp_path, extension):
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels(9, 5)).convert("L" if extension == ".pgm" else "RGB").save(tmp_path / "a" / f"x{extension}")
    source = open_source(tmp_path)
    assert [int(v[0]) for v in source.sizes(np.array([0]))] == [9, 5]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_sizes_are_those_of_the_upright_image(tmp_path, turn, format):
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / f"x.{format.lower()}"
    Image.fromarray(pixels(9, 5)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape[0] == (5 if turn >= 5 else 9)
    assert [int(v[0]) for v in open_source(tmp_path).sizes(np.array([0]))] == list(expected.shape[:2])
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(turned(image, orientation(image))), expected)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_broken_exif_leaves_the_picture(tmp_path, exif):
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels(9, 5)).save(tmp_path / "a" / "x.jpg", exif=exif)
    assert [int(v[0]) for v in open_source(tmp_path).sizes(np.array([0]))] == [9, 5]
    with Image.open(tmp_path / "a" / "x.jpg") as image:
        assert orientation(image) == 1 and image.size == (5, 9)


UNREADABLE = {
    "empty": b"",
    "text": b"this is no image",
    "cut in the header": encoded(pixels(9, 5))[:100],
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "no pixels": b"GIF89a\0\0\0\0\x00\0\0,\0\0\0\0\0\0\0\0\0\x02\x02\x44\x01\0;",
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_image_is_reported_by_name(folder, kind):
    (folder / "b" / "5.jpg").write_bytes(UNREADABLE[kind])
    source = open_source(folder)
    assert source.name(3).endswith("b/5.jpg")
    for use in (lambda: source.sizes(np.arange(5)), lambda: source.is_jpeg(3)):
        with pytest.raises(DataError, match="b/5.jpg: not a readable image .*; replace or remove it") as caught:
            use()
        assert "\n" not in str(caught.value) and "<_io" not in str(caught.value)


def test_links_and_odd_entries_do_no_harm(folder, caplog):
    """Each is followed, passed over with a warning, or reported by name when asked for; nothing waits or recurses."""
    (folder / "loop").symlink_to("loop")
    (folder / "d").symlink_to("b")
    (folder / "b" / "up").symlink_to("..")
    (folder / "b" / "notes.txt").write_text("x")
    (folder / "stray.jpg").write_bytes(b"")
    (folder / "c" / "x.jpg").symlink_to("x.jpg")
    (folder / "c" / "y.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "c" / "z.jpg")
    with caplog.at_level(logging.WARNING):
        source = open_source(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: skipped 6 entries that are not images, e.g. {folder}/b/notes.txt"
    ]
    assert source.class_names == ["a é", "b", "c", "d"] and source.num_samples == 9
    assert source.name(7) == f"{folder}/d/10.JPG"
    assert [int(v[0]) for v in source.sizes(np.array([7]))] == [7, 5]
    for index, name in ((4, "x.jpg"), (5, "y.jpg"), (6, "z.jpg")):
        for use in (lambda i=index: source.read(i), lambda i=index: source.sizes(np.array([i]))):
            with pytest.raises(DataError, match=f"c/{name}: not a readable image"):
                use()


def test_an_empty_file_is_reported_when_read(folder):
    (folder / "b" / "5.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="5.jpg: not a readable image .the file is empty"):
        open_source(folder).read(3)


def test_names_that_are_no_text(folder):
    raw = os.fsencode(folder) + b"/b/\xff\n.jpg"
    with open(raw, "wb") as file:
        file.write(encoded(pixels(3, 2)))
    source = open_source(folder)
    assert source.name(3) == f"{folder}/b/\\udcff\\n.jpg"
    assert [int(v[0]) for v in source.sizes(np.array([3]))] == [3, 2]
    assert len(source.fingerprint()) == 64
    assert printable("ab é 犬") == "ab é 犬"


def test_folders_without_images(folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="images/empty: no image in this class; add images .* or remove the folder"):
        open_source(folder)
    with pytest.raises(UserError, match=r"images/b: no class folders in it; put the images in .*/CLASS/"):
        open_source(folder / "b")


def test_what_may_not_be_read_is_named():
    """As a user without rights, even where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        for inner in ("open", "shut"):
            (root / inner).mkdir()
            (root / inner / "x.jpg").write_bytes(encoded(pixels(3, 2)))
        (root / "open" / "x.jpg").chmod(0)
        (root / "shut").chmod(0)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(UserError, match="/shut: cannot be listed .Permission denied.; change its permissions"):
                open_source(root)
            os.seteuid(user)
            (root / "shut").chmod(0o755)
            if user == 0:
                os.seteuid(65534)
            source = open_source(root)
            for use in (lambda: source.read(0), lambda: source.sizes(np.array([0]))):
                with pytest.raises(DataError, match="open/x.jpg: not a readable image .*Permission denied"):
                    use()
        finally:
            os.seteuid(user)


def test_fingerprint_of_a_folder(folder):
    first = open_source(folder).fingerprint()
    assert FolderSource(str(folder)).fingerprint() == first
    (folder / "b/2.png").write_bytes(encoded(pixels(6, 10), "PNG"))
    second = open_source(folder).fingerprint()
    (folder / "b/2.png").rename(folder / "b/3.png")
    third = open_source(folder).fingerprint()
    (folder / "b/3.png").rename(folder / "c/3.png")
    assert len({first, second, third, open_source(folder).fingerprint()}) == 4
