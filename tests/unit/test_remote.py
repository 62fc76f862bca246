"""Sources and betons by URL: the same bytes as from the disk, whatever the server does on the way."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.convert import remote_tree, workers
from pipelines.convert.job import ConvertSettings, convert
from pipelines.convert.warm import warm
from pipelines.errors import DataError, UserError
from pipelines.read import remote
from pipelines.read.source import open_source
from tests.archives import write_parquet
from tests.beton_tools import encoded, pixels
from tests.file_server import FileServer
from tests.unit.test_sources_in import tar, tar_bytes

CLASSES = ("ant", "bee", "wire fox")
KEEP = ConvertSettings(seed=3)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 36 images as a folder, as tar shards, in one tar of class tars and as parquet."""
    root = tmp_path_factory.mktemp("disk")
    images = {
        name: {f"{i} {name}.jpg": encoded(pixels(20, 30, 40 * label + i)) for i in range(12)}
        for label, name in enumerate(CLASSES)
    }
    for name, files in images.items():
        (root / "folder" / name).mkdir(parents=True)
        for file, data in files.items():
            (root / "folder" / name / file).write_bytes(data)
    (root / "shards").mkdir()
    rows = [
        (f"{name}{i}", label, data)
        for label, name in enumerate(CLASSES)
        for i, data in enumerate(images[name].values())
    ]
    for shard in range(3):
        files = {}
        for key, label, data in rows[shard::3]:
            files |= {f"{key}.cls": b"%d" % label, f"{key}.jpg": data}
        tar(root / "shards" / f"x-00{shard}.tar", files)
    tar(root / "train.tar", {f"{name}.tar": tar_bytes(files) for name, files in images.items()})
    pytest.importorskip("pyarrow")
    write_parquet(root / "x.parquet", [row[2] for row in rows], [row[1] for row in rows])
    (root / "names.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture
def server(disk: Path) -> Iterator[FileServer]:
    with contextlib.closing(FileServer(disk)) as made:
        yield made


@pytest.fixture
def memory(disk: Path) -> Iterator[str]:
    """The disk's files in fsspec's memory."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(disk), "/bucket", recursive=True)
    yield "memory://bucket"
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DELAYS", (0.0,) * 4)


def made(src: str, path: Path, workers: int = 2, **options: object) -> tuple[bytes, dict]:
    settings = ConvertSettings(seed=3, **options)
    manifest = convert(src, str(path), settings=settings, workers=workers)
    return path.read_bytes(), manifest


def same(first: tuple[bytes, dict], second: tuple[bytes, dict]) -> bool:
    """Bytes and manifest, but for `request`, which holds the files' times."""
    return first[0] == second[0] and first[1] | {"request": ""} == second[1] | {"request": ""}


@pytest.mark.parametrize("name", ["folder", "shards", "train.tar", "x.parquet"])
def test_memory(name: str, disk: Path, memory: str, tmp_path: Path) -> None:
    local = made(str(disk / name), tmp_path / "local.beton")
    assert same(made(f"{memory}/{name}", tmp_path / "remote.beton"), local)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "local.beton", "local.beton.json", "remote.beton", "remote.beton.json",
    ]  # fmt: skip


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["shards", "train.tar", "x.parquet"])
def test_web_server(name: str, ranges: bool, disk: Path, server: FileServer, tmp_path: Path) -> None:
    """With parts of files, and without, where a file is copied first."""
    server.ranges = ranges
    url = f"{server.url}/shards/x-{{000..002}}.tar" if name == "shards" else f"{server.url}/{name}?key=secret"
    options = {"classes": f"{server.url}/names.txt"}
    local = made(str(disk / name), tmp_path / "local.beton", classes=str(disk / "names.txt"))
    assert same(made(url, tmp_path / "remote.beton", **options), local)


def test_a_pattern(disk: Path, memory: str, tmp_path: Path) -> None:
    local = made(str(disk / "shards"), tmp_path / "local.beton")
    assert same(made(f"{memory}/shards/x-*.tar", tmp_path / "remote.beton"), local)


def test_what_fails_now_and_then_is_asked_for_again(disk: Path, server: FileServer, tmp_path: Path) -> None:
    server.fail_first = True
    local = made(str(disk / "train.tar"), tmp_path / "local.beton")
    assert same(made(f"{server.url}/train.tar", tmp_path / "remote.beton"), local)
    assert min(map(server.requests.count, server.requests)) >= 2


def test_a_server_that_goes_away(
    disk: Path, server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; what was converted is not converted again, and the bytes are those of an undisturbed run."""
    monkeypatch.setattr("pipelines.convert.job.TASK", 4)
    monkeypatch.setattr(remote_tree, "AHEAD", 1)
    local = made(str(disk / "train.tar"), tmp_path / "local.beton")
    images = [0]

    def fail(path: str, before: int) -> int:
        images[0] += 1
        return 500 if images[0] > 30 else 0

    server.fail = fail
    with pytest.raises(
        UserError,
        match=r"^http.*/train.tar: cannot be read \(HTTP 500 .*tried 5 times; look at the address .* then run",
    ):
        made(f"{server.url}/train.tar", tmp_path / "remote.beton", workers=1)  # so that its tasks end in their order
    server.fail = lambda path, before: 0
    with caplog.at_level(logging.INFO, "std_fast"):
        assert same(made(f"{server.url}/train.tar", tmp_path / "remote.beton"), local)
    assert re.search(r"[1-9] of 9 tasks were done by an earlier run", caplog.text)


def test_an_image_that_is_gone_is_a_fault(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = remote._read_part

    def read_part(url: str, start: int, end: int) -> bytes:
        if url.endswith("3 ant.jpg"):
            raise FileNotFoundError("no such object")
        return real(url, start, end)

    monkeypatch.setattr(remote, "_read_part", read_part)
    with pytest.raises(DataError, match=r"1 of 36 images cannot be converted: ant/3 ant.jpg .is gone"):
        convert(f"{memory}/folder", str(tmp_path / "x.beton"), settings=KEEP, workers=1)


@pytest.mark.parametrize("where", ["ranges", "copied", "disk"])
def test_a_file_that_is_replaced_while_it_is_read(
    where: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No beton of half of each; the same command then converts the new file alone."""
    old = (disk / "train.tar").read_bytes()
    new = old.replace(b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1")  # the same length, read as other images
    (tmp_path / "train.tar").write_bytes(old)
    server = FileServer(tmp_path, ranges=where != "copied")

    def replace(path: str, before: int) -> int:
        if before == (3 if where == "copied" else 20) and (tmp_path / "train.tar").read_bytes() == old:
            (tmp_path / "train.tar").write_bytes(new)
        return 0

    if where == "disk":
        made_task = workers.Workers.run
        monkeypatch.setattr(workers.Workers, "run", lambda *args: [*made_task(*args), replace("", 20)][:-1])
    server.fail = replace
    src = str(tmp_path / "train.tar") if where == "disk" else f"{server.url}/train.tar"
    with contextlib.closing(server):
        with pytest.raises(UserError, match="train.tar: was replaced or removed while it was read; run the same"):
            made(src, tmp_path / "x.beton")
        assert not (tmp_path / "x.beton").exists()
        assert made(src, tmp_path / "x.beton")[0] == made(str(tmp_path / "train.tar"), tmp_path / "y.beton")[0]


def test_a_file_that_was_copied_may_get_another_date(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(disk / "train.tar", tmp_path)
    made_task = workers.Workers.run

    def touch_first(*args: Any) -> Any:
        os.utime(tmp_path / "train.tar", (1, 1))
        return made_task(*args)

    monkeypatch.setattr(workers.Workers, "run", touch_first)
    with contextlib.closing(FileServer(tmp_path, ranges=False)) as server:
        assert made(f"{server.url}/train.tar", tmp_path / "x.beton")[0]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"access is refused \(HTTP 403 Forbidden\); look at the credentials"),
        (405, r"the server does not serve such a request \(HTTP 405 .*download the file first"),
        (416, "was replaced or removed while it was read; run the same command again"),
    ],
)
def test_what_a_server_refuses(status: int, message: str, server: FileServer) -> None:
    file = remote.info(f"{server.url}/train.tar")
    server.fail = lambda path, before: status
    with pytest.raises(UserError, match=message):
        remote.read(file.url, 0, 10)
    assert len(server.requests) == 2  # not tried again


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{http}/folder", "127.0.0.1:[0-9]+/folder: a folder on a web server cannot be listed; give the URL of a .tar"),
        ("{http}/no.tar?key=secret", "/no.tar: not found; look at the address"),
        ("http://127.0.0.1:1/x.tar", "x.tar: cannot be read .*refused"),
        ("s3://bucket/x", "s3://bucket/x: .* needs a package that is not installed: pip install s3fs"),
        ("nope://bucket/x.tar", "nope://bucket/x.tar: Protocol not known"),
        ("memory://bucket/none", "memory://bucket/none: nothing is there"),
        ("memory://bucket/names.txt", "names.txt: not a known source"),
        ("{http}/x-{{3..1}}.tar", "is no range"),
        ("{http}/x-{{0..99999}}-{{0..99999}}.tar", "stands for more than 1,000,000 files"),
        ("http://user:secret@[::1/x.tar", r"^http://\[::1/x.tar: not an address"),
        ("http://127.0.0.1:none/x.tar", "none/x.tar: not an address"),
    ],
)
def test_mistakes(url: str, message: str, server: FileServer, memory: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        convert(url.format(http=server.url), str(tmp_path / "x.beton"))
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_addresses_with_blanks_and_a_login(server: FileServer, tmp_path: Path) -> None:
    (server.root / "ä b.bin").write_bytes(b"some bytes")
    url = f"{server.url}/ä b.bin".replace("//", "//user:s%40cret@")
    file = remote.info(url)
    assert remote.read(file.url, 5, 10) == b"bytes"
    assert server.logins == {"Basic dXNlcjpzQGNyZXQ="}
    assert remote.shown(url) == f"{server.url}/ä b.bin"


@pytest.mark.parametrize("start", [0, 6])
def test_a_server_that_gives_other_bytes_than_asked_for(start: int, server: FileServer, disk: Path) -> None:
    server.first_byte = start
    with pytest.raises(UserError, match=rf"bytes 5-9 were asked for, and bytes {start}-{start + 4}/.* came"):
        remote.read(f"{server.url}/names.txt", 5, 10)


def test_braces() -> None:
    assert remote.expand_braces("a-{08..11}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    assert remote.expand_braces("plain") == ["plain"]


def test_a_copy_goes_on_where_it_was(
    server: FileServer, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "CHUNK", 1000)
    file = remote.info(f"{server.url}/train.tar")
    server.fail = lambda path, before: 403 if before == 11 else 0
    with pytest.raises(UserError, match="access is refused .HTTP 403"):
        remote.copy(file, str(tmp_path / "x"))
    assert (tmp_path / "x.part").stat().st_size == 9000 and not (tmp_path / "x").exists()
    server.requests.clear()
    server.fail = lambda path, before: 0
    remote.copy(file, str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == (disk / "train.tar").read_bytes()
    assert server.requests[1][2] == "bytes=9000-9999"


# the cache of betons


@pytest.fixture
def beton(disk: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of a converted file on the server; the cache is empty."""
    monkeypatch.setenv("STD_FAST_CACHE", str(tmp_path / "cache"))
    if not (disk / "x.beton").exists():
        for part in range(2):
            convert(str(disk / "folder"), str(disk / f"x-{part}.beton"), settings=KEEP, workers=1, shard=(part, 2))
        convert(str(disk / "folder"), str(disk / "x.beton"), settings=KEEP, workers=1)
    return f"{server.url}/x.beton"


def test_warm_fills_the_cache(beton: str, disk: Path, server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.beton: not in the cache .*; run `std-fast warm URL` first"):
        open_source(beton)
    found = warm(beton)
    assert found["bytes"] == (disk / "x.beton").stat().st_size
    source = open_source(beton)
    assert source.fingerprint() == open_source(str(disk / "x.beton")).fingerprint()
    assert source.class_names == list(CLASSES)
    server.requests.clear()
    warm(beton)
    assert [method for method, _, _ in server.requests] == ["HEAD"]  # nothing is copied twice


def test_warm_several_parts(beton: str, disk: Path, server: FileServer) -> None:
    url = f"{server.url}/x-{{0..1}}.beton"
    warm(url)
    assert open_source(url).num_samples == 36


def test_warm_notices_a_change_and_damage(beton: str, disk: Path) -> None:
    warm(beton)
    content = (disk / "x.beton").read_bytes()
    try:
        (disk / "x.beton").write_bytes(content[:-1] + b"x")
        with pytest.raises(DataError, match="its checksum is not its manifest's"):
            warm(beton)
    finally:
        (disk / "x.beton").write_bytes(content)
    cached = Path(warm(beton)["paths"][0])
    cached.write_bytes(content[:-1] + b"x")  # a fault of the local disk
    assert warm(beton)["bytes"] == len(content)
    assert cached.read_bytes() == content


def test_warm_from_memory_without_a_manifest(
    beton: str, disk: Path, memory: str, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.filesystem("memory").rm("/bucket/x.beton.json")
    warm(f"{memory}/x.beton")
    assert "has no manifest" in caplog.text and open_source(f"{memory}/x.beton").num_samples == 36


# the manifest


def test_parts_of_one_conversion(beton: str, disk: Path) -> None:
    """One id, each part once; another for other settings. The fingerprint is that of the data alone."""
    manifests = [json.loads((disk / f"x-{part}.beton.json").read_text()) for part in range(2)]
    single = json.loads((disk / "x.beton.json").read_text())
    ids = {manifest["conversion"].pop("id") for manifest in manifests}
    assert [manifest["conversion"] for manifest in manifests] == [
        {"part": i, "parts": 2, "images": 36} for i in range(2)
    ]
    assert len(ids) == 1 and single["conversion"]["id"] not in ids


def test_the_fingerprint_is_that_of_the_data(disk: Path, tmp_path: Path) -> None:
    first = made(str(disk / "folder"), tmp_path / "a.beton")[1]
    other = convert(str(disk / "train.tar"), str(tmp_path / "b.beton"), settings=ConvertSettings(size=12))
    assert first["fingerprint"] == other["fingerprint"]
    assert first["source"]["sha256"] != other["source"]["sha256"]
    names = tmp_path / "names"
    names.write_text("bee\nant\nwire fox\n")
    third = made(str(disk / "folder"), tmp_path / "c.beton", classes=str(names))[1]
    assert third["fingerprint"] == first["fingerprint"]  # classes by name, whatever their numbers


def test_credentials_that_run_out_are_no_faults_of_images(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a beton would lack all images from there on."""
    real, calls = remote._read_part, [0]

    def read_part(url: str, start: int, end: int) -> bytes:
        calls[0] += 1
        if calls[0] > 20:
            raise PermissionError("token expired")
        return real(url, start, end)

    monkeypatch.setattr(remote, "_read_part", read_part)
    with pytest.raises(UserError, match="access is refused .token expired.; look at the credentials"):
        convert(f"{memory}/folder", str(tmp_path / "x.beton"), settings=KEEP, workers=1, on_error="skip")
    assert not (tmp_path / "x.beton").exists()


def test_the_commands_take_urls(
    beton: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from std_fast import cli

    assert cli.main(["inspect", beton]) == 2 and "run `std-fast warm URL` first" in capsys.readouterr().err
    assert cli.main(["warm", beton]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", beton, "--json", "--sheet", str(tmp_path / "x.png")]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 36
    assert cli.main(["verify", beton, "--decode"]) == 0
    source = beton.replace("x.beton", "train.tar")
    assert cli.main(["convert", source, str(tmp_path / "y.beton"), "--seed", "3"]) == 0
    assert (tmp_path / "y.beton").read_bytes() == made(str(disk / "train.tar"), tmp_path / "z.beton")[0]
    assert "train.tar: 36 images of 3 classes: 0 = ant, 1 = bee, 2 = wire fox" in caplog.text


def test_killed_while_it_fetches(disk: Path, server: FileServer, tmp_path: Path) -> None:
    """What it leaves in its working folder does no harm to the next run."""
    local = made(str(disk / "train.tar"), tmp_path / "local.beton")
    path = tmp_path / "x.beton"
    code = "import sys; from pipelines.convert.job import *; convert(*sys.argv[1:], settings=ConvertSettings(seed=3))"
    command = [sys.executable, "-c", code, f"{server.url}/train.tar", str(path)]
    process = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[2])

    def fail(url: str, before: int) -> int:
        if before >= 20:
            process.kill()
        return 0

    server.fail = fail
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / ".x.beton.converting" / "fetched").is_dir() and not path.exists()
    server.fail = lambda url, before: 0
    assert same(made(f"{server.url}/train.tar", path), local)
    assert not (tmp_path / ".x.beton.converting").exists()
