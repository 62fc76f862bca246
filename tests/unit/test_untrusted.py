"""Files from elsewhere do no harm: nothing in them runs, claims more than there is, or reaches outside."""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipelines.convert.job import ConvertSettings, convert
from pipelines.convert.labels import read_labels
from pipelines.convert.sources import list_source
from pipelines.convert.tar_index import TarDamaged, members
from pipelines.convert.verify import verify
from pipelines.errors import LONGEST, DataError, UserError
from pipelines.read.beton import BetonSource
from pipelines.read.folder import FolderSource
from pipelines.read.source import open_source
from pipelines.untrusted import Refused, confined, read_bytes, read_json
from std_fast import cli
from std_fast.config import recipe as recipes
from std_fast.config.options import LOADERS
from std_fast.config.recipe import StudentSpec, TeacherSpec
from std_fast.config.schema import read_yaml
from std_fast.runtime import checkpoint
from std_fast.teachers.classifiers import build_classifier, read_run, read_weights
from std_fast.teachers.target_cache import TargetCache
from std_fast.teachers.target_format import read_header
from std_fast.teachers.teacher import build_teacher
from tests import confined_functions as outside
from tests import crafted
from tests.beton_tools import encoded, jpeg_sample, pixels, write_beton
from tests.unit.test_source import SAMPLES

ROOT = Path(__file__).resolve().parents[2]


# -- nothing runs -----------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def teacher(weights: Path, name: str = "") -> None:
    half = (0.5, 0.5, 0.5)
    build_teacher(TeacherSpec(name, weights=str(weights)), 3, 32, half, half, "distill.teachers.0")


def hub_folder(path: Path) -> None:
    """Its weights are the pickle, its config.json is a good one."""
    path.rename(path.with_name("pytorch_model.bin"))
    path.with_name("config.json").write_text('{"architecture": "test_resnet", "num_classes": 3}')
    teacher(path.parent)


def run_folder(path: Path) -> None:
    (path.parent / "checkpoints").mkdir()
    (path.parent / "recipe.yaml").write_text("summary: x\n")
    path.rename(path.parent / "checkpoints" / "step-00000001.safetensors")
    read_run(path.parent)


def targets(path: Path) -> None:
    path.rename(path.with_name("targets.json"))
    read_header(path.parent)


def epoch_of_targets(path: Path) -> None:
    about = {"format": 1, "fingerprint": {}, "classes": 3, "teachers": 1, "top_k": 0}
    path.with_name("targets.json").write_text(json.dumps(about))
    path.rename(path.with_name("epoch-00000.targets"))
    TargetCache(path.parent, read_header(path.parent), 1, 1, False).open(0)


def manifest(path: Path) -> None:
    beton = write_beton(path.with_name("x.beton"), SAMPLES)
    path.rename(path.with_name("x.beton.json"))
    open_source(beton)


def images_of(name: str):
    def listing(path: Path) -> None:
        (path.parent / "src").mkdir()
        path.rename(path.parent / "src" / name)
        convert(str(path.parent / "src"), str(path.parent / "x.beton"), workers=1)

    return listing


PLACES = {
    "a teacher's .pth": lambda path: teacher(path.rename(path.with_suffix(".pth")), "test_resnet"),
    "a teacher's .safetensors": lambda path: teacher(path.rename(path.with_suffix(".safetensors")), "test_resnet"),
    "a hub folder's weights": hub_folder,
    "student.weights": lambda path: read_weights(path.rename(path.with_suffix(".pt"))),
    "a run's checkpoint": run_folder,
    "targets.json": targets,
    "an epoch of targets": epoch_of_targets,
    "a beton's manifest": manifest,
    "a beton": lambda path: open_source(path),
    "a recipe": lambda path: recipes.load(str(path)),
    "a label file": lambda path: read_labels(str(path), ["a.jpg"]),
    "the devkit": lambda path: read_labels(str(path.rename(path.with_suffix(".tar.gz"))), ["a.jpg"]),
    "an image": lambda path: FolderSource(str(image_folder_of(path))).sizes(np.arange(1)),
    "a tar": images_of("x.tar"),
    "a parquet file": images_of("x.parquet"),
    "CIFAR's Python version": images_of("data_batch_1"),
}


def image_folder_of(path: Path) -> Path:
    (path.parent / "images" / "class").mkdir(parents=True)
    path.rename(path.parent / "images" / "class" / "x.jpg")
    return path.parent / "images"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_malicious_pickle_does_not_run(place, how, tmp_path):
    target, path = tmp_path / "harm", tmp_path / "inner" / "file"
    path.parent.mkdir()
    content = {"state_dict": {"weight": torch.ones(1)}, "hook": Malicious(target)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    data = path.read_bytes()
    with pytest.raises(UserError):
        PLACES[place](path)
    assert not target.exists()
    if how == "pickle":
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert target.exists()  # it would have run


@pytest.mark.parametrize("key", LOADERS)
def test_a_builders_options_load_nothing_by_themselves(key, tmp_path):
    """timm's builders take `checkpoint_path`, which older releases unpickle, and other ways to files and downloads."""
    torch.save({"hook": Malicious(tmp_path / "harm")}, tmp_path / "evil.pth")
    options = {
        key: {"file": str(tmp_path / "evil.pth")} if key.startswith("pretrained_cfg") else str(tmp_path / "evil.pth")
    }
    (tmp_path / "hub").mkdir()
    config = {"architecture": "test_resnet", "num_classes": 3, "model_args": options}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "hub" / "pytorch_model.bin")
    torch.save({"weight": torch.ones(1)}, tmp_path / "hub" / "pytorch_model.bin")
    ways = (
        lambda: StudentSpec(options=options),
        lambda: TeacherSpec(name="test_resnet", options=options),
        lambda: build_classifier("test_resnet", 3, 32, **options),
        lambda: teacher(tmp_path / "hub"),
        lambda: cli.run(["info", "test_resnet", "--options", json.dumps(options)]),
    )
    for way in ways:
        with pytest.raises(UserError, match=f"{key}: would load a file past all checks"):
            way()
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/tmp/x", "https://example.org/x", "../x"])
def test_an_architecture_is_a_name_and_no_address(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 3}))
    torch.save({"weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no such model"):
        teacher(tmp_path)


# -- text that expands, or is nested ----------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (LAUGHS, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("a: &a [1, *a]\n", "more than 100000 values"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "{b: " * 5000, "nested too deeply"),
        ("x" * (1 << 21), "more than"),
        ("!!python/object/apply:os.system ['touch harm']", "could not determine a constructor"),
        ("run: {batch: 8}\nrun:\n  seed: 1\n", "line 2 repeats the key 'run'; keep one"),
        ("student: {options: {dim: 8, dim: 16}}", "line 1 repeats the key 'dim'; keep one"),
    ],
)
def test_yaml_that_is_a_bomb_ends_in_one_line(text, complaint, tmp_path):
    for way in (lambda: read_yaml(text, "x.yaml"), lambda: recipes.loads(text, "x.yaml")):
        with pytest.raises(UserError, match=complaint) as caught:
            way()
        assert str(caught.value).startswith("x.yaml: ")
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match="x.yaml: cannot be read as YAML"):
        recipes.load(str(tmp_path / "x.yaml"))


@pytest.mark.parametrize(
    ("word", "complaint"),
    [("9" * 5000, "Exceeds the limit"), ("!!int x", "could not convert"), ("!!timestamp x", "cannot be read as YAML")],
)
def test_a_word_that_yaml_cannot_read_is_refused_where_it_is_no_text(word, complaint):
    with pytest.raises(UserError, match=complaint):
        read_yaml(f"a: {word}", "x.yaml")
    if not word.startswith("!!"):
        with pytest.raises(UserError, match=complaint):
            recipes.loads(f"student: {{options: {{a: {word}}}}}", "x.yaml")
    assert recipes.loads(f"name: {word}", "x.yaml").name == word.split()[-1]


def test_aliases_and_merges_of_a_usual_kind_are_read():
    text = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 3}\n"
    assert read_yaml(text, "x") == yaml.safe_load(text) == {
        "a": {"x": 1, "y": [1, 2]}, "b": {"x": 1, "y": [1, 2]}, "c": {"x": 3, "y": [1, 2]},
    }  # fmt: skip


@pytest.mark.parametrize("value", [".nan", ".inf", "1e400"])
def test_a_recipe_holds_finite_numbers(value):
    with pytest.raises(UserError, match="optim.lr: expected float"):
        recipes.load("digits_mixer", [("optim.lr", value)])


@pytest.mark.parametrize("value", ["{1: 2}", "{a: !!binary aGk=}", "{a: [.nan]}"])
def test_options_are_what_json_can_say(value):
    with pytest.raises(UserError, match="student.options: expected dict"):
        recipes.load("digits_mixer", [("student.options", value)])


def test_a_message_is_one_printable_line_of_bounded_length():
    for text in ("a\nb\tc\x1b[31m\u2028\x00", "\udcff bytes", "x" * 10_000_000):
        shown = str(UserError(text))
        assert shown.isprintable() and len(shown) <= LONGEST
        shown.encode()
    assert str(UserError("x" * LONGEST)) == "x" * LONGEST


# -- places that are no files -----------------------------------------------------------------------------------------


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        read_json(pipe)
    beton = write_beton(tmp_path / "x.beton", SAMPLES)
    os.mkfifo(tmp_path / "x.beton.json")
    with pytest.raises(UserError, match="not a regular file"):
        open_source(beton)
    os.mkfifo(tmp_path / "step-00000001.safetensors")
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "step-00000001.safetensors")
    os.mkfifo(tmp_path / "targets.json")
    with pytest.raises(UserError, match="no header of stored targets"):
        read_header(tmp_path)


def test_a_file_that_claims_terabytes_is_not_read(tmp_path):
    """Sparse files take no room on the disk, and all memory if they are read into it."""
    (tmp_path / "src" / "ant").mkdir(parents=True)
    image = tmp_path / "src" / "ant" / "x.jpg"
    image.write_bytes(encoded(pixels(8, 8)))
    os.truncate(image, 1 << 40)
    with pytest.raises(DataError, match="x.jpg: not a readable image"):
        FolderSource(str(tmp_path / "src")).read(0)
    with pytest.raises(DataError, match="more than 268435456 .max_bytes"):
        convert(str(tmp_path / "src"), str(tmp_path / "y.beton"), workers=1)
    beton = write_beton(tmp_path / "x.beton", SAMPLES)
    (tmp_path / "x.beton.json").write_text('{"classes": []}')
    os.truncate(tmp_path / "x.beton.json", 1 << 40)
    with pytest.raises(UserError, match="x.beton.json: not a manifest"):
        open_source(beton)
    with pytest.raises(OSError, match="more than 10 bytes"):
        read_bytes(beton, 10)


# -- archives ---------------------------------------------------------------------------------------------------------


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (header("a.jpg", b"77777777777\0") + b"x" * 512, "cut short within a.jpg"),  # 8 GiB
        (header("a.jpg", b"\xff" * 12) + b"x" * 512, "cut short within a.jpg"),  # 2^95 bytes
        (header("a.jpg", b"-0000000001\0") + b"x" * 512, "no size"),
        (header("", b"\xff" * 12, b"L"), "more than any name needs"),
        (header("", b"-0000000001\0", b"L"), "more than any name needs"),
        (header("", b"00000000024\0", b"x") + b"20 size=-9999999999\n".ljust(512, b"\0")
         + header("a", b"0" * 11 + b"\0"),
         "no size"),
        (header("", b"00004000000\0", b"x") + b"9" * (1 << 20), "damaged pax header"),
        (header("", b"00000000024\0", b"x") + (b"9" * 5000 + b" a=b\n")[:512], "damaged pax header"),
    ],
)  # fmt: skip
def test_a_tars_claims_are_checked(data, complaint, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(data + bytes(1024))
    with open(path, "rb") as file, pytest.raises(TarDamaged, match=complaint):
        list(members(file.fileno()))
    with pytest.raises(DataError, match=complaint):
        convert(str(path), str(tmp_path / "x.beton"), workers=1)
    assert {p.name for p in tmp_path.iterdir()} <= {".x.beton.converting", "x.beton.faults.txt", "x.tar"}


def test_a_pax_header_of_many_records_is_read_in_linear_time(tmp_path):
    """A megabyte of the shortest records: to copy the rest for each of them is a hundred gigabytes."""
    records = b"5 a=\n" * ((1 << 20) // 5)
    path = tmp_path / "x.tar"
    image = header("a.jpg", b"%011o\0" % 4) + b"data".ljust(512, b"\0")
    path.write_bytes(header("", b"%011o\0" % len(records), b"x") + records.ljust(1 << 20, b"\0") + image + bytes(1024))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with open(path, "rb") as file:
        (member,) = members(file.fileno())
    assert member.name == "a.jpg"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 10  # processor time; 60 before


def test_a_devkit_that_is_a_bomb(tmp_path):
    path = tmp_path / "devkit.tar.gz"
    with gzip.open(path, "wb", 9) as out:
        for _ in range(80):
            out.write(bytes(1 << 20))
    with pytest.raises(UserError, match="not ImageNet's devkit .*bytes when unpacked"):
        read_labels(str(path), ["a.jpg"])


CRASH = ROOT / "tests" / "fuzz" / "corpus" / "devkit" / "scipy-segmentation-fault"


def test_a_devkit_that_crashes_scipy_ends_in_one_line(tmp_path):
    """Found by the fuzzer: scipy.io.loadmat reads from a wild address."""
    path = tmp_path / "devkit.tar.gz"
    path.write_bytes(gzip.compress(CRASH.read_bytes()))
    with pytest.raises(UserError, match="not ImageNet's devkit"):
        read_labels(str(path), ["a.jpg"])


def parquet_of(path: Path, values: pa.Array, count: int) -> None:
    """Rows that are all one value: a few bytes of dictionary-encoded parquet."""
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), values)
    labels = pa.array(np.zeros(count, np.int8))
    pq.write_table(pa.table({"image": images, "label": labels}), path, compression="zstd", store_schema=False)


def test_parquet_that_unpacks_to_far_more_is_refused(tmp_path):
    (tmp_path / "work").mkdir()
    parquet_of(tmp_path / "x.parquet", pa.array([bytes(1 << 20)]), 2000)
    assert (tmp_path / "x.parquet").stat().st_size < 1 << 20
    with pytest.raises(UserError, match="x.parquet: its images take more than 20 times the file"):
        list_source(str(tmp_path / "x.parquet"), ConvertSettings(max_bytes=1 << 24), str(tmp_path / "work"))
    assert sum(file.stat().st_size for file in (tmp_path / "work").iterdir()) < 1 << 28


def test_parquet_of_endless_rows_is_refused(tmp_path):
    parquet_of(tmp_path / "x.parquet", pa.array([b""]), (1 << 22) + 1)
    with pytest.raises(UserError, match="x.parquet: 4194305 rows, more than"):
        list_source(str(tmp_path / "x.parquet"), ConvertSettings(), str(tmp_path))


def test_parquet_of_too_long_images_names_them(tmp_path):
    pq.write_table(pa.table({"image": [encoded(pixels(4, 4)), bytes(5000)], "label": [0, 1]}), tmp_path / "x.parquet")
    listing = list_source(str(tmp_path / "x.parquet"), ConvertSettings(max_bytes=4000), str(tmp_path))
    assert listing.names == ["x.parquet/0"]
    assert listing.faults == [("x.parquet/1", "5000 bytes are more than 4000 (max_bytes)")]


# -- a confined reader ------------------------------------------------------------------------------------------------


def test_a_confined_reader_returns_from_another_process():
    value, pid = confined(outside.value_and_process, {"a": [1, None, "ä"]})
    assert value == {"a": [1, None, "ä"]} and pid != os.getpid()
    assert confined(outside.prints) == 1


@pytest.mark.parametrize(
    ("function", "limits", "complaint"),
    [
        (outside.takes_memory, {}, "more than 4096 MiB of memory"),
        (outside.never_ends, {"seconds": 1}, "took more than 1 s"),
        (outside.crashes, {}, "SIGSEGV"),
        (outside.value_and_process, {}, "TypeError"),
    ],
)
def test_what_goes_wrong_in_a_confined_reader_is_said(function, limits, complaint):
    with pytest.raises(Refused, match=complaint):
        confined(function, **limits)


def test_errors_of_a_confined_reader_keep_their_kind():
    with pytest.raises(UserError, match="x: fix it"):
        confined(outside.complains)
    with pytest.raises(OSError) as caught:
        confined(outside.disk_full)
    assert caught.value.errno == 28


# -- betons -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crafted_betons(tmp_path_factory):
    """A folder of them: good ones that hold bad images. (Broken structures: test_source.py.)"""
    folder = tmp_path_factory.mktemp("crafted")
    crafted.write_all(folder)
    return folder


READ = {"a-PNG.beton", "without-Huffman-tables.beton"}  # wrongly labelled, and libjpeg has tables of its own


@pytest.mark.parametrize("backend", ["ffcv", "dali", "torch", "resident"])
def test_a_crafted_beton_ends_in_a_clear_error_and_no_crash(backend, crafted_betons):
    """In a process of its own, so that a crash would be seen."""
    command = [sys.executable, "-m", "tests.crafted", str(crafted_betons), backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} at {lines[-1]}: {done.stderr[-500:]}"
    outcome = dict(lines)
    assert len(outcome) == len(crafted.IMAGES)
    if "is not installed" in str(outcome):
        pytest.skip(f"no {backend} here")
    for name, text in outcome.items():
        if name in READ:
            assert text == "read", name
        else:
            assert text.startswith(f"UserError: {crafted_betons / name}: "), f"{name}: {text}"
            assert "convert" in text


def test_a_beton_of_very_many_fields_is_refused_at_once(tmp_path):
    path = write_beton(tmp_path / "x.beton", SAMPLES)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 2, 60000)
    path.write_bytes(bytes(data[:24]) + b"".join(struct.pack("<B16s1024s", 1, b"%d" % i, b"") for i in range(60000)))
    with pytest.raises(UserError, match="announces 60000 fields, more than"):
        BetonSource(str(path))


def test_class_names_of_a_manifest_are_shown_without_their_control_characters(tmp_path, capsys):
    path = write_beton(tmp_path / "x.beton", [jpeg_sample(8, 8, 0)])
    (tmp_path / "x.beton.json").write_text(
        json.dumps({"classes": ["\x1b[2Jant", "\ud800", "b\nc"], "samples": "\x1b[2J"})
    )
    assert open_source(path).class_names == [r"\x1b[2Jant", r"\ud800", r"b\nc"]
    assert cli.main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    shown.encode()
    assert all(line.isprintable() for line in verify(str(path)))


# -- images -----------------------------------------------------------------------------------------------------------


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(pixels(8, 8)))
    at = data.index(b"\xff\xc0") + 5
    struct.pack_into(">HH", data, at, height, width)
    return bytes(data)


def png_of(width: int, height: int) -> bytes:
    import zlib

    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = [body, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)) for piece in pieces
    )


@pytest.mark.parametrize("data", [jpeg_of(65000, 65000), png_of(60000, 60000), png_of(2**31 - 1, 2**31 - 1)])
def test_images_that_claim_huge_sizes_are_named(data, tmp_path):
    (tmp_path / "src" / "ant").mkdir(parents=True)
    (tmp_path / "src" / "ant" / "bomb.png").write_bytes(data)
    with pytest.raises(DataError, match="ant/bomb.png .claims"):
        convert(str(tmp_path / "src"), str(tmp_path / "x.beton"), workers=1)
    with pytest.raises(DataError, match=r"ant/bomb\.png"):
        FolderSource(str(tmp_path / "src")).sizes(np.arange(1))
    assert PIL.Image.MAX_IMAGE_PIXELS is not None  # nobody has switched PIL's own limit off


# -- checkpoints ------------------------------------------------------------------------------------------------------

META = {"step": 3, "recipe": "", "num_classes": 3}


@pytest.mark.parametrize(
    ("tensors", "meta", "complaint"),
    [
        ({}, {"step": -1}, "have step -1"),
        ({}, {"step": "3"}, "have step '3'"),
        ({}, {"step": True}, "have step True"),
        ({}, {"recipe": ["summary"]}, r"have recipe \['summary'\]"),
        ({}, {"num_classes": 0}, "have num_classes 0"),
        ({}, {"num_classes": 2**40}, "have num_classes"),
        ({}, {"class_names": ["a", "\x1b[2J"]}, "have class_names"),
        ({}, {"seconds": {"train": "x"}}, "have seconds"),
        ({}, {"seconds": {"train": float("nan")}}, "have seconds"),
        ({}, {"best": []}, r"have best \[\]"),
        ({}, {"devices": 0}, "have devices 0"),
        ({}, {"complete": 1}, "have complete 1"),
        ({"x": torch.ones(1)}, {}, "a tensor named 'x'"),
        ({"optim.x": torch.ones(1)}, {}, "a tensor named 'optim.x'"),
        ({"evil.x": torch.ones(1)}, {}, "a tensor named 'evil.x'"),
    ],
)
def test_a_checkpoint_with_a_right_digest_and_wrong_content_is_refused(tensors, meta, complaint, tmp_path):
    """Whoever crafts a file can compute a digest too."""
    checkpoint.save(tmp_path / "good", {"model.x": torch.ones(1)}, META)
    checkpoint.load(tmp_path / "good")
    checkpoint.save(tmp_path / "x", {"model.x": torch.ones(1), **tensors}, META | meta)
    with pytest.raises(UserError, match=f"{complaint}.*do not trust the file"):
        checkpoint.load(tmp_path / "x")


@pytest.mark.parametrize("missing", ["step", "recipe", "num_classes"])
def test_a_checkpoint_that_lacks_something_is_refused(missing, tmp_path):
    checkpoint.save(tmp_path / "x", {"model.x": torch.ones(1)}, {k: v for k, v in META.items() if k != missing})
    with pytest.raises(UserError, match=f"have {missing} None"):
        checkpoint.load(tmp_path / "x")


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.weight": torch.ones(2, 2)},
        {"model.weight": torch.ones(3, 2), "model.bias": torch.ones(3), "optim.nothing:step": torch.ones(())},
        {"model.weight": torch.ones(3, 2), "model.bias": torch.ones(3), "model.more": torch.ones(1)},
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tensors):
    model = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match="does not fit the model of its recipe"):
        checkpoint.restore(tensors, model, torch.optim.AdamW(model.parameters()))
