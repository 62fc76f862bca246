"""Every kind of source gives the beton that the same images in a folder give; hostile archives give faults by name."""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipelines.convert.job import ConvertSettings, convert
from pipelines.convert.sources import list_source
from pipelines.errors import DataError, UserError
from pipelines.read.beton import BetonSource
from pipelines.read.decode import decode_rgb
from tests.archives import devkit_files, tar_bytes, write_parquet
from tests.beton_tools import encoded, pixels

CLASSES = ("n01", "n02", "n07")
KEEP = ConvertSettings(seed=None)


@pytest.fixture(scope="module")
def contents() -> dict[str, dict[str, bytes]]:
    """Class -> file name -> bytes."""
    return {
        name: {f"{name}_{i}.JPEG": encoded(pixels(20, 30, 10 * label + i)) for i in range(4)}
        for label, name in enumerate(CLASSES)
    }


@pytest.fixture(scope="module")
def expected(contents: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The beton of the images as a folder, not shuffled."""
    folder = tmp_path_factory.mktemp("folder")
    for name, files in contents.items():
        (folder / "src" / name).mkdir(parents=True)
        for file, data in files.items():
            (folder / "src" / name / file).write_bytes(data)
    convert(str(folder / "src"), str(folder / "x.beton"), settings=KEEP, workers=1)
    return (folder / "x.beton").read_bytes()


def tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> None:
    path.write_bytes(tar_bytes(files, form))


def made(src: Path, tmp_path: Path, **options: object) -> tuple[bytes, dict]:
    manifest = convert(str(src), str(tmp_path / "x.beton"), settings=ConvertSettings(seed=None, **options), workers=1)
    return (tmp_path / "x.beton").read_bytes(), manifest


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_imagenets_tar_of_tars(form: int, contents: dict, expected: bytes, tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", {f"{name}.tar": tar_bytes(files, form) for name, files in contents.items()}, form)
    beton, manifest = made(tmp_path / "train.tar", tmp_path)
    assert beton == expected
    assert manifest["classes"] == list(CLASSES)


def test_a_folder_of_class_tars(contents: dict, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name, files in contents.items():
        tar(tmp_path / "src" / f"{name}.tar", files)
    assert made(tmp_path / "src", tmp_path)[0] == expected


def flat(contents: dict) -> dict[str, bytes]:
    return {file: data for files in contents.values() for file, data in files.items()}


@pytest.mark.parametrize("kind", ["lines", "names", "kaggle", "stems"])
@pytest.mark.parametrize("container", ["tar", "folder"])
def test_flat_images_with_a_label_file(
    kind: str, container: str, contents: dict, expected: bytes, tmp_path: Path
) -> None:
    files = flat(contents)
    if container == "tar":
        tar(tmp_path / "val.tar", {f"val/{name}": data for name, data in files.items()})
        src = tmp_path / "val.tar"
    else:
        src = tmp_path / "val"
        src.mkdir()
        for name, data in files.items():
            (src / name).write_bytes(data)
    lines = {
        "lines": [name[:3] for name in sorted(files)],
        "names": [f"{name} {name[:3]}" for name in reversed(files)],
        "kaggle": ["ImageId,PredictionString", *(f"{name[:-5]},{name[:3]} 1 2 30 40" for name in files)],
        "stems": [f"{name[:-5]}\t{CLASSES.index(name[:3])}" for name in files],
    }[kind]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(lines) + "\n")
    beton, manifest = made(src, tmp_path, labels=str(labels))
    assert beton == expected
    assert manifest["classes"] == (["0", "1", "2"] if kind == "stems" else list(CLASSES))


def test_imagenets_devkit(contents: dict, expected: bytes, tmp_path: Path) -> None:
    """Its numbers are not in the order of the WordNet ids; its table says what they stand for."""
    pytest.importorskip("scipy.io")
    ids = {"n07": 1, "n01": 2, "n02": 3, "n00": 1000}
    files = flat(contents)
    parts = devkit_files(ids, [ids[name[:3]] for name in sorted(files)], parents=1)
    devkit = tmp_path / "devkit.tar.gz"
    devkit.write_bytes(gzip.compress(tar_bytes(parts)))
    tar(tmp_path / "val.tar", files)
    beton, manifest = made(tmp_path / "val.tar", tmp_path, labels=str(devkit))
    assert beton == expected and manifest["classes"] == list(CLASSES)
    (tmp_path / "truth.txt").write_bytes(list(parts.values())[1])
    with pytest.raises(UserError, match="numbers begin at 1; .* give the devkit"):
        list_source(str(tmp_path / "val.tar"), ConvertSettings(labels=str(tmp_path / "truth.txt")), str(tmp_path))


def shard_files(contents: dict) -> dict[str, bytes]:
    found = {}
    for label, files in enumerate(contents.values()):
        for name, data in files.items():
            key = f"train/{name[:-5]}"
            found |= {f"{key}.cls": b"%d\n" % label, f"{key}.jpg": data, f"{key}.json": b"{}"}
    return found


def test_tar_shards(contents: dict, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    files = list(shard_files(contents).items())
    tar(tmp_path / "src" / "shard-000.tar", dict(files[:15]))
    tar(tmp_path / "src" / "shard-001.tar", dict(files[15:]))
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    beton, manifest = made(tmp_path / "src", tmp_path, classes=str(tmp_path / "names.txt"))
    assert beton == expected
    assert manifest["classes"] == list(CLASSES) and len(manifest["ignored"]) == 12


def faults_of(src: Path, tmp_path: Path, **options: object) -> dict[str, str]:
    return dict(list_source(str(src), ConvertSettings(**options), str(tmp_path)).faults)


def test_hostile_members_are_named_and_not_followed(contents: dict, tmp_path: Path) -> None:
    """Nothing is written anywhere, whatever the members are called."""
    image = encoded(pixels(20, 30))
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = image, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
            out.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)

        add("good.cls", data=b"0")
        add("good.jpg")
        add("../../out.jpg")
        add("/etc/out.jpg")
        add("a/../../out2.jpg")
        add("soft.jpg", tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.jpg", tarfile.LNKTYPE, link="good.jpg")
        add("null", tarfile.CHRTYPE)
        add("disk", tarfile.BLKTYPE)
        add("pipe", tarfile.FIFOTYPE)
        add("folder", tarfile.DIRTYPE)
        add("good.png")
        add("lost.jpg")
        add("word.jpg")
        add("word.cls", data=b"cat")
        add("l" * 300 + ".jpg")
        add("l" * 300 + ".cls", data=b"1")
    before = sorted(os.listdir(tmp_path))
    listing = list_source(str(path), KEEP, str(tmp_path))
    assert listing.names == ["shard.tar/good.jpg", "shard.tar/" + "l" * 300 + ".jpg"]
    assert listing.labels.tolist() == [0, 1]
    reasons = {name.removeprefix("shard.tar/"): reason.split(":")[0] for name, reason in listing.faults}
    outside = "a path that leads out of the archive in an archive"
    assert reasons == {
        "../../out.jpg": outside,
        "/etc/out.jpg": outside,
        "a/../../out2.jpg": outside,
        "soft.jpg": "a symbolic link in an archive",
        "hard.jpg": "a hard link in an archive",
        "null": "a character device in an archive",
        "disk": "a block device in an archive",
        "pipe": "a pipe in an archive",
        "good.png": "a second image of the same key",
        "lost.jpg": "has no .cls of the same key",
        "word.jpg": "its .cls holds no class number; if a name, give --classes",
    }
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("missing", [513, 1024, 10240])
def test_a_tar_cut_short_is_a_fault(missing: int, contents: dict, tmp_path: Path) -> None:
    """Also where it is cut between two members, so that all that is left looks complete."""
    path = tmp_path / "shard.tar"
    tar(path, shard_files(contents))
    content = path.read_bytes().rstrip(b"\0")
    end = -(-len(content) // 512) * 512
    path.write_bytes(path.read_bytes()[: end + 1024 - missing])
    reasons = faults_of(path, tmp_path)
    assert "cut short" in reasons["shard.tar"]


def test_an_inner_tar_cannot_reach_beyond_itself(contents: dict, tmp_path: Path) -> None:
    """An inner tar whose last member claims more bytes than the inner tar has, though the outer one has them."""
    inner = tar_bytes({"a.jpg": bytes(100)})[:1024]
    header = bytearray(inner)
    header[124:136] = b"%011o\0" % 5000
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    tar(tmp_path / "train.tar", {"n01.tar": bytes(header), "n02.tar": tar_bytes({"b.jpg": bytes(9000)})})
    listing = list_source(str(tmp_path / "train.tar"), KEEP, str(tmp_path))
    assert listing.names == ["train.tar/n02.tar/b.jpg"]
    assert dict(listing.faults)["train.tar/n01.tar"] == "the archive is cut short within a.jpg"


def test_a_tar_without_labels_asks_for_them(contents: dict, tmp_path: Path) -> None:
    tar(tmp_path / "val.tar", flat(contents))
    with pytest.raises(UserError, match="carry no labels .* give --labels"):
        list_source(str(tmp_path / "val.tar"), KEEP, str(tmp_path))


# parquet and CIFAR


def parquet(path: Path, contents: dict, struct: bool) -> None:
    pytest.importorskip("pyarrow")
    rows = [(data, label) for label, files in enumerate(contents.values()) for data in files.values()]
    images = [{"bytes": data, "path": None} if struct else data for data, _ in rows]
    write_parquet(path, images, [label for _, label in rows], names=list(CLASSES) if struct else None)


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(struct: bool, contents: dict, expected: bytes, tmp_path: Path) -> None:
    (tmp_path / "src" / "data").mkdir(parents=True)
    first, rest = dict(list(contents.items())[:1]), dict(list(contents.items())[1:])
    names = ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")
    parquet(tmp_path / "src" / "data" / names[0], first, struct)
    parquet(tmp_path / "src" / "data" / names[1], {"n01": {}, **rest}, struct)
    beton, manifest = made(tmp_path / "src", tmp_path)
    assert beton == expected
    assert manifest["classes"] == (list(CLASSES) if struct else ["0", "1", "2"])
    assert sorted(os.listdir(tmp_path)) == ["src", "x.beton", "x.beton.json"]


def test_parquet_of_several_splits_needs_a_choice(contents: dict, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    parquet(tmp_path / "src" / "train-00000.parquet", contents, True)
    parquet(tmp_path / "src" / "test-00000.parquet", dict(list(contents.items())[:1]), True)
    with pytest.raises(UserError, match="holds test, train; choose one with --split$"):
        list_source(str(tmp_path / "src"), KEEP, str(tmp_path))
    with pytest.raises(UserError, match="split 'val'"):
        list_source(str(tmp_path / "src"), ConvertSettings(split="val"), str(tmp_path))
    assert len(list_source(str(tmp_path / "src"), ConvertSettings(split="test"), str(tmp_path))) == 4


def test_parquet_needs_room_for_its_copy(contents: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "train.parquet", contents, True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    (tmp_path / "work").mkdir()
    with pytest.raises(UserError, match="its images are copied beside the result .* free there"):
        list_source(str(tmp_path / "train.parquet"), KEEP, str(tmp_path / "work"))
    assert os.listdir(tmp_path / "work") == []


def test_parquet_without_its_columns_or_bytes(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: no column image or img or jpg among picture, label"):
        list_source(str(tmp_path / "a.parquet"), KEEP, str(tmp_path))
    write_parquet(tmp_path / "b.parquet", [b"x", None, b"y"], [0, 0, None])
    assert faults_of(tmp_path / "b.parquet", tmp_path) == {
        "b.parquet/1": "the row has no image bytes",
        "b.parquet/2": "the row has no label",
    }
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(UserError, match="c.parquet: cannot be read as parquet"):
        list_source(str(tmp_path / "c.parquet"), KEEP, str(tmp_path))


@pytest.mark.parametrize("hundred", [False, True])
def test_cifar(hundred: bool, tmp_path: Path) -> None:
    """Stored raw, the pixels are exactly those of the file."""
    random = np.random.default_rng(0)
    (tmp_path / "src").mkdir()
    count = 6
    images = random.integers(0, 256, (2, count, 3, 32, 32), dtype=np.uint8)
    labels = random.integers(0, 3, (2, count), dtype=np.uint8)
    names = ("train.bin", "test.bin") if hundred else ("data_batch_1.bin", "test_batch.bin")
    for name, pixels_, labels_ in zip(names, images, labels, strict=True):
        columns = [np.full((count, 1), 77, np.uint8)] if hundred else []
        columns += [labels_[:, None], pixels_.reshape(count, -1)]
        (tmp_path / "src" / name).write_bytes(np.concatenate(columns, axis=1).tobytes())
    meta = "fine_label_names.txt" if hundred else "batches.meta.txt"
    (tmp_path / "src" / meta).write_text("apple\nbear\ncar\n\n")
    for part, split in enumerate(("train", "test")):
        settings = ConvertSettings(seed=None, mode="raw", split=split)
        path = str(tmp_path / f"{split}.beton")
        convert(str(tmp_path / "src"), path, settings=settings, workers=1)
        source = BetonSource(path)
        assert source.labels.tolist() == labels[part].tolist()
        assert source.class_names == ["apple", "bear", "car"]
        for i in range(count):
            assert (decode_rgb(source, i) == images[part, i].transpose(1, 2, 0)).all()
    assert list_source(str(tmp_path / "src"), KEEP, str(tmp_path)).classes == ["apple", "bear", "car"]  # of train
    path = tmp_path / "src" / names[0]
    path.write_bytes(b"\xff" + path.read_bytes()[1:] if not hundred else b"\xff\xff" + path.read_bytes()[2:])
    with pytest.raises(UserError, match=f"{names[0]}: has label 255, so it is no file of CIFAR"):
        list_source(str(tmp_path / "src"), KEEP, str(tmp_path))


# folders and mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda src: None, "no class folders"),
        (lambda src: (src / "a").mkdir(), "a: no image in this class"),
        (lambda src: (src / "a" / "b").mkdir(parents=True), "a: no image in this class; .* convert .*a$"),
        (lambda src: (src / "x.jpg").write_bytes(b""), "no class folders"),
        (lambda src: (src / "x.bin").write_bytes(b"12345"), "no class folders"),
        (lambda src: (src / "data_batch_1").write_bytes(b""), "pickled, which can run code"),
        (lambda src: (src / "train.bin").write_bytes(b"12345"), "5 bytes are no multiple of 3074"),
    ],
)
def test_sources_that_are_none(make: object, message: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    make(src)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        list_source(str(src), KEEP, str(tmp_path))


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.zip", "x.txt", "x.bin"])
def test_files_that_are_no_source(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"12345")
    with pytest.raises(UserError, match=name):
        list_source(str(tmp_path / name), KEEP, str(tmp_path))


def test_a_file_that_is_no_tar_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match=r"1 of 1 images cannot be converted: x.tar \(no tar header at byte 0"):
        convert(str(tmp_path / "x.tar"), str(tmp_path / "x.beton"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01\nn02\n", "class 'n07' .1 such. is not among the 2 classes given"),
        ("n01\nn01\nn07\n", "different, non-empty names"),
        ('{"classes": 3}', "different, non-empty names"),
        ('{"samples": 3}', "JSON without a list `classes`"),
        ("", "different, non-empty names"),
    ],
)
def test_class_lists_that_do_not_fit(text: str, message: str, contents: dict, tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", {f"{name}.tar": tar_bytes(files) for name, files in contents.items()})
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        list_source(str(tmp_path / "train.tar"), ConvertSettings(classes=str(tmp_path / "classes.txt")), str(tmp_path))


def test_a_manifest_gives_the_classes_of_another_part(contents: dict, tmp_path: Path) -> None:
    """A validation set that lacks a class keeps the training set's numbers."""
    for part, names in (("train", CLASSES), ("val", CLASSES[1:])):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "x.jpg").write_bytes(next(iter(contents[name].values())))
    convert(str(tmp_path / "train"), str(tmp_path / "train.beton"), settings=KEEP, workers=1)
    chosen = ConvertSettings(seed=None, classes=str(tmp_path / "train.beton.json"))
    convert(str(tmp_path / "val"), str(tmp_path / "val.beton"), settings=chosen, workers=1)
    source = BetonSource(str(tmp_path / "val.beton"))
    assert source.labels.tolist() == [1, 2] and source.class_names == list(CLASSES)
