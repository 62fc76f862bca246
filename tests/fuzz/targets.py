"""What is fuzzed: one class for each reader of files that a user may have downloaded.

A target makes valid inputs (`seeds`), changes them where the format hurts (`mutate`, beside the fuzzer's own changes),
and reads an input as a user's command would (`read`). Formats with checksums are sealed anew before they are read, as
whoever crafts a file does. All is well when `read` returns or raises UserError of one printable line; anything else is
a finding.
"""

from __future__ import annotations

import abc
import contextlib
import gzip
import hashlib
import io
import json
import logging
import random
import struct
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from pipelines.errors import UserError
from tests.archives import devkit_files, tar_bytes
from tests.beton_tools import ROW, ROWS_START, Sample, encoded, jpeg_sample, pixels, raw_sample, write_beton

LONGEST_MESSAGE = 2000  # characters
ODD_VALUES = (
    None, -1, 0, 1e400, [], {}, "x", [None], {"a": {"b": 1}}, True, 2**70, "9" * 400, float("nan"), {"": 0},
)  # fmt: skip
"""in the place of one that JSON holds"""
MOST_PIXELS = 1 << 20  # of an image, so that executions stay short; tests/unit/test_untrusted.py has larger ones


class Finding(Exception):
    """An input did something that it must not."""


class Target(abc.ABC):
    max_bytes = 4096
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    """changes an input where its format hurts; None: the fuzzer's own changes do"""

    def __init__(self, folder: Path) -> None:
        """folder: an empty one, in which the target keeps its files."""
        self.folder = folder

    @abc.abstractmethod
    def seeds(self) -> list[bytes]:
        """Valid inputs, no longer than max_bytes."""

    @abc.abstractmethod
    def read(self, data: bytes) -> None:
        """Reads an input; the same one always in the same way. Raises UserError for one that is refused."""


def execute(target: Target, data: bytes) -> bool:
    """Whether the input was accepted. Raises Finding, or whatever else `read` raises, for a finding."""
    try:
        target.read(data)
    except UserError as error:
        text = str(error)
        if not text.isprintable() or len(text) > LONGEST_MESSAGE:
            raise Finding(f"a message of {len(text)} characters, or not one printable line: {text[:200]!r}") from error
        return False
    return True


# -- betons -----------------------------------------------------------------------------------------------------------

SAMPLES = [jpeg_sample(9, 7, 0), raw_sample(5, 6, 2, 1), jpeg_sample(6, 8, 1, 2)]


def odd_jpegs() -> list[Sample]:
    """JPEGs that take other ways through a decoder: progressive, gray, no subsampling, restart markers."""
    kinds = ({"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1})
    files = [encoded(pixels(20, 18, i), quality=75, **kind) for i, kind in enumerate(kinds)]  # type: ignore[arg-type]
    files.append(encoded(pixels(20, 18)[..., 0], quality=75))
    return [Sample(data, 20, 18, i % 2) for i, data in enumerate(files)]


def interesting(value: int, bits: int, size: int, rng: random.Random) -> int:
    """A number to put where `value` stands in a file of `size` bytes."""
    chosen = rng.choice(
        (0, 1, value + rng.choice((-24, -8, -1, 1, 8, 24)), value ^ 1 << rng.randrange(bits), size, size - value,
         1 << rng.randrange(bits), (1 << rng.randrange(bits)) - 1, rng.randrange(size + 1), -value,
         rng.getrandbits(bits))
    )  # fmt: skip
    return chosen & (1 << bits) - 1


class Beton(Target):
    """Header, field descriptors, metadata and allocation table; by `open_source`, `inspect` and `verify`."""

    max_bytes = 8192

    def seeds(self) -> list[bytes]:
        path = self.folder / "seed"
        lists = (SAMPLES, SAMPLES[1:2], odd_jpegs(), [Sample(b"\xff\xd8\xff\xd9", 4, 4, 0)])
        return [write_beton(path, samples).read_bytes() for samples in lists]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Puts a number into one to three of the header's, the metadata's or the allocation table's places."""
        out = bytearray(data)
        if len(out) < ROWS_START + ROW:
            return data
        table = min(struct.unpack_from("<Q", out, 16)[0], len(out))
        rows = min(struct.unpack_from("<Q", out, 8)[0], (len(out) - ROWS_START) // ROW)
        entries = (len(out) - table) // 24
        for _ in range(rng.randint(1, 3)):
            places = [(0, 16), (2, 16), (4, 32), (8, 64), (16, 64), (24, 8), (24 + 1041, 8), (25, 64)]
            if rows:
                row = ROWS_START + ROW * rng.randrange(rows)
                places += [(row, 8), (row + 1, 16), (row + 3, 16), (row + 5, 64), (row + 16, 64)] * 2
            if entries:
                places += [(table + 24 * rng.randrange(entries) + 8 * column, 64) for column in range(3)] * 2
            at, bits = rng.choice(places)
            if at + bits // 8 <= len(out):
                value = int.from_bytes(out[at : at + bits // 8], "little")
                out[at : at + bits // 8] = interesting(value, bits, len(out), rng).to_bytes(bits // 8, "little")
        return bytes(out)

    def _source(self, data: bytes) -> tuple[Path, Any]:
        from pipelines.read.beton import BetonSource

        path = self.folder / "x.beton"
        path.write_bytes(data)
        return path, BetonSource(str(path))

    def read(self, data: bytes) -> None:
        from pipelines.convert.verify import inspect, verify

        path, source = self._source(data)
        heights, widths = source.sizes(np.arange(source.num_samples))
        starts, lengths = source.pointers.astype(object), source.byte_sizes
        inside = (starts + lengths <= len(data)) & (lengths > 0)
        raw = ~source.jpeg & (lengths != 3 * heights * widths)
        if not inside.all() or raw.any() or (heights < 1).any() or (widths < 1).any():
            raise Finding("a sample that does not lie within the file, or whose size is not that of its pixels")
        if not (0 <= source.labels.min() and source.labels.max() < source.num_classes):
            raise Finding("a label outside the classes")
        source.fingerprint()
        json.dumps(inspect(str(path)))
        verify(str(path))


class Loading(Beton):
    """A beton's images through a backend: its sizes against the images' own, and what native code is handed."""

    backend = ""

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Half of the time within the images, where the bytes of JPEG headers are, else as for Beton."""
        if rng.random() < 0.3:
            return super().mutate(data, rng)
        out = bytearray(data)
        starts = [at for at in range(len(out) - 8) if out[at : at + 3] == b"\xff\xd8\xff"] or [0]
        for _ in range(rng.randint(1, 4)):
            start = rng.choice(starts)
            markers = [at for at in range(start, min(start + 800, len(out) - 9)) if out[at] == 0xFF and out[at + 1]]
            at = rng.choice(markers or [start]) + rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, rng.randrange(64)))
            if at < len(out):
                out[at] = rng.choice((0, 1, 0xFF, 0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDD, rng.randrange(256)))
        return bytes(out)

    def read(self, data: bytes) -> None:
        path, source = self._source(data)
        if (source.heights.astype(int) * source.widths > MOST_PIXELS).any():
            raise UserError("an image too large for fuzzing")
        outcomes = [self._outcome(str(path), kind) for kind in ("torch", self.backend)]
        if (outcomes[0] is None) != (outcomes[1] is None):
            raise Finding(f"torch gives {_shown(outcomes[0])}, {self.backend} {_shown(outcomes[1])}")

    def _outcome(self, path: str, backend: str) -> float | None:
        """Mean of the first batch, None where an image is refused."""
        try:
            return self._first(path, backend)
        except UserError:
            return None

    def _spec(self, path: str) -> Any:
        from pipelines.read.batch import LoaderSpec
        from pipelines.read.crops import CropSpec

        crop = CropSpec("full")  # the full image, so that damage anywhere in it is seen by all
        return LoaderSpec(path, 64, image_size=8, shuffle=False, drop_last=False, crop=crop, threads=1, ahead=1)

    def _first(self, path: str, backend: str) -> float:
        from pipelines import open_loader

        with open_loader(self._spec(path), backend) as loader:
            return self._mean(loader)

    @staticmethod
    def _mean(loader: Any) -> float:
        epoch = loader.epoch(0)
        try:
            return next(epoch).images.float().mean().item()
        finally:
            epoch.close()


def _shown(outcome: float | None) -> str:
    return "an error" if outcome is None else f"a batch of mean {outcome:.1f}"


class LoadingFfcv(Loading):
    __doc__ = Loading.__doc__
    backend = "ffcv"


class LoadingDali(Loading):
    """As LoadingFfcv; DALI's pipeline is kept, because to build one takes a quarter of a second."""

    backend = "dali"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._loader: Any = None

    def _first(self, path: str, backend: str) -> float:
        if backend != self.backend:
            return super()._first(path, backend)
        from pipelines.loaders.base import LoaderBase
        from pipelines.loaders.dali.loader import DaliLoader
        from pipelines.loaders.dali.prepare import Preparer
        from pipelines.read.beton import BetonSource

        source = BetonSource(path)
        if self._loader is None:
            self._loader = DaliLoader(self._spec(path), source)
        loader = self._loader
        LoaderBase.__init__(loader, loader.spec, source)
        loader._preparer = Preparer(replace(loader.spec, resample=loader.resample), source, loader.tracker)
        return self._mean(loader)


# -- text -------------------------------------------------------------------------------------------------------------


class Manifest(Target):
    """X.beton.json beside a good beton, by `inspect` (as text and JSON) and `verify`, and as a list of classes."""

    max_bytes = 2048

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.beton = write_beton(folder / "x.beton", SAMPLES)

    def seeds(self) -> list[bytes]:
        sha256 = hashlib.sha256(self.beton.read_bytes()).hexdigest()
        record = {
            "format": 1, "samples": 3, "bytes": self.beton.stat().st_size, "sha256": sha256, "shard": [0, 1],
            "source": {"kind": "folder", "sha256": sha256}, "counts": {"samples": 3, "faults": 1}, "ignored": [],
            "faults": [{"name": "a.jpg", "reason": "empty"}], "settings": {"size": 256}, "versions": {"pillow": "1"},
            "request": sha256, "samples_per_class": [1, 1, 1], "classes": ["ant", "bee", "cät"],
        }  # fmt: skip
        return [json.dumps(record, indent=1).encode(), b'{"classes": ["a", "b", "\\ud800"]}', b"[[]]", b"a\nb\nc\n"]

    def read(self, data: bytes) -> None:
        from pipelines.convert.labels import read_classes
        from pipelines.convert.verify import verify

        path = self.folder / "x.beton.json"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            _encodable(read_classes(str(path)))
        for line in verify(str(self.beton)):
            if not line.isprintable() or len(line) > LONGEST_MESSAGE:
                raise Finding(f"verify says {line[:200]!r}, {len(line)} characters")
        for words in ([], ["--json"]):
            command_line(["inspect", str(self.beton), *words])


def _encodable(words: list[str]) -> None:
    if not all(word.isprintable() for word in words):
        raise Finding(f"names that are no printable text: {words!r}")


def command_line(words: list[str]) -> str:
    """What `std-fast WORDS` prints on a terminal in UTF-8. Raises UserError."""
    from std_fast import cli

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out):
        cli.run(words)
    out.flush()
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


class RecipeFile(Target):
    """A recipe in YAML; lines behind a line of `%%` are overrides of the command line, KEY VALUE each."""

    max_bytes = 2048

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from std_fast.config.recipe import Recipe
        from std_fast.config.schema import describe

        self.fields = [(name, default) for name, default, _ in describe(Recipe)]

    def seeds(self) -> list[bytes]:
        from std_fast.config import recipe as recipes

        small = "base: mixer_s16_std\nrun: {batch: 64, length: 3 epochs}\ndistill:\n  teachers: [{name: resnet50}]\n"
        texts = [
            small,
            small + "%%\noptim.lr 1e-3\ndata.crop.scale [0.5, 1]\ndistill.teachers.0.weights runs/t\nrun.seed 7\n",
            "a: &a [1, 2]\nb: *a\n",
            "data: {image_size: 1_0, crop: {kind: center}}\nrun: {seed: 0x1F}\nsummary: 2001-12-14t21:59:43.10-05:00\n",
            "student: {name: mixer, options: {? [a] : 1.5, <<: {b: ~}}}\noptim: {betas: !!python/tuple [0.9, 1]}\n",
        ]
        dumped = recipes.dump(recipes.load("digits_mixer"))
        return [text.encode() for text in [*texts, dumped] if len(text.encode()) <= self.max_bytes]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Adds an override of a real field with a strange value."""
        values = (
            "0", "-1", "1e400", ".nan", "-.inf", "[]", "{}", "~", "''", "[[1, 2], [3]]", "{a: {b: c}}", "1:60", "0o9",
            "2001-99-99", "!!binary x", "[1, *x]", "&x [*x]", "9" * 5000, "'5 %'", "nan epochs", "1e309 steps",
            "0.5 epochs", "-0.0", "99999999999999999999", "true", "1 day", "'\\u0000'", "[" * 300, "0 gpu-hours",
            "\u2029",
        )  # fmt: skip
        name, default = rng.choice(self.fields)
        name += rng.choice(("", "", "", ".0", ".x", ".0.name", ".9999999999"))
        value = rng.choice((*values, default))
        separator = b"" if b"%%" in data else b"\n%%"
        return data + separator + f"\n{name} {value}".encode()

    def read(self, data: bytes) -> None:
        from std_fast.config import recipe as recipes

        text, _, rest = data.partition(b"\n%%\n")
        path = self.folder / "recipe.yaml"
        path.write_bytes(text)
        pairs = [line.partition(" ") for line in rest.decode("utf-8", "replace").splitlines()]
        recipe = recipes.load(str(path), [(key, value) for key, _, value in pairs])
        again = recipes.loads(recipes.dump(recipe))
        if recipes.dump(again) != recipes.dump(recipe):
            raise Finding("a recipe that is another one after it was saved and read")


class Labels(Target):
    """Label files as `convert --labels` takes them, and lists of classes."""

    NAMES = ("a_1.jpg", "a_2.jpg", "b_3.jpg")

    def seeds(self) -> list[bytes]:
        lists = ["0\n1\n1\n", "ImageId,Prediction\na_1,n01 1 2 3 4\na_2,n02 9\nb_3,n01\n", "a_1.jpg ant\na_2.jpg bee\n"]
        lists += ['"a_1.jpg" 3\n', "a_1.jpg\t0\n", '{"classes": ["ant", "bee"]}']
        return [text.encode() for text in lists]

    def read(self, data: bytes) -> None:
        from pipelines.convert.labels import read_classes

        path = self.folder / "labels.txt"
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            _encodable(read_classes(str(path)))
        self.examine(path)

    def examine(self, path: Path) -> None:
        from pipelines.convert.labels import read_labels

        labels, _ = read_labels(str(path), list(self.NAMES))
        if not all(isinstance(label, (int, str)) for label in labels.values()):
            raise Finding("a label that is neither a number nor a name")


class Devkit(Labels):
    """ImageNet's devkit as a tar, which is compressed before it is read: a process for each, so few executions."""

    max_bytes = 6144

    def seeds(self) -> list[bytes]:
        return [tar_of(devkit_files({"n02": 1, "n01": 2}, [1, 2, 2]))]

    def read(self, data: bytes) -> None:
        path = self.folder / "devkit.tar.gz"
        path.write_bytes(gzip.compress(sealed_tar(data), 1))
        self.examine(path)


# -- archives ---------------------------------------------------------------------------------------------------------


def tar_of(files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    return tar_bytes(files, form).rstrip(b"\0") + bytes(1536)


def sealed_tar(data: bytes) -> bytes:
    """The checksums of all blocks that look like headers made right."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


class Tar(Target):
    """Tars of class tars, of shards, with long names and pax headers; by `list_source`, and their images' bytes."""

    max_bytes = 1 << 14

    def seeds(self) -> list[bytes]:
        image = encoded(pixels(4, 5), quality=50)
        inner = tar_of({"x_1.jpg": image, "x_2.JPEG": image[:-9]})
        shard = {"s/1.jpg": image, "s/1.cls": b"3", "s/2.png": image, "s/2.cls": b"0\n", "s/2.json": b"{}"}
        long = {"l" * 120 + "/" + "m" * 90 + ".jpg": image, "é.jpg": b""}
        forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        return [tar_of({"n01.tar": inner, "n02.tar": inner}), *(tar_of(shard, form) for form in forms),
                *(tar_of(long, form) for form in forms[1:])]  # fmt: skip

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Another kind, size, name or magic in a header, or another record in a pax header."""
        out = bytearray(data)
        headers = [at for at in range(0, len(out) - 511, 512) if out[at + 257 : at + 262] == b"ustar"]
        if not headers:
            return data
        at = rng.choice(headers)
        sizes = (b"00000000000\0", b"77777777777\0", b"-0000000001\0", b"\x80" + bytes(10) + b"\1", b"\xff" * 12,
                 b"%011o\0" % rng.randrange(2 * len(out)), b"%011o\0" % rng.randrange(1 << 21))  # fmt: skip
        records = (b"20 size=99999999999\n", b"11 size=-1\n", b"9" * 40 + b" path=x\n", b"16 GNU.sparse.a=\n",
                   b"15 path=../../x\n", b"4 =\n" * 100, b"12 path=/x\n\0\0")  # fmt: skip
        change = rng.randrange(4)
        if change == 0:
            out[at + 156 : at + 157] = rng.choice(b"0123456789LKxgSMADV\0").to_bytes(1, "little")
        elif change == 1:
            out[at + 124 : at + 136] = rng.choice(sizes)
        elif change == 2:
            name = rng.choice(
                (b"../../x.jpg", b"/etc/x.jpg", b"", b"a\0b.jpg", b"x.tar", b"s/1.cls", b"./s/1.jpg", b"\xff")
            )
            out[at : at + 100] = name.ljust(100, b"\0")
        else:
            record = rng.choice(records)
            out[at + 156 : at + 157], out[at + 124 : at + 136] = b"x", b"%011o\0" % len(record)
            out[at + 512 : at + 512 + len(record)] = record
        return bytes(out)

    def read(self, data: bytes) -> None:
        from pipelines.convert.sources import list_source
        from pipelines.convert.workers import ConvertTask, convert_task
        from pipelines.read.image_prep import ConvertSettings

        path = self.folder / "x.tar"
        path.write_bytes(sealed_tar(data))
        settings = ConvertSettings(max_pixels=MOST_PIXELS)
        listing = list_source(str(path), settings, str(self.folder))
        if (listing.offsets < 0).any() or (listing.offsets + listing.sizes > len(data)).any():
            raise Finding("an image that lies outside the archive")
        count = len(listing)
        task = ConvertTask(0, list(range(count)), [listing.place(i) for i in range(count)], [False] * count)
        convert_task(task, settings, listing.files, False, lambda source: None)


class Parquet(Target):
    """Parquet files with images and labels, by the part that `list_source` runs in a process of its own."""

    max_bytes = 1 << 14

    def seeds(self) -> list[bytes]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        image = encoded(pixels(4, 5), quality=50)
        tables = [
            pa.table({"image": [{"bytes": image, "path": "a"}, {"bytes": None, "path": "b"}], "label": [0, 1]}),
            pa.table({"img": [image, image, b""], "fine_label": pa.array([2, 0, 1], pa.int32())}),
            pa.table({"image": [b"x"] * 9, "label": ["ant"] * 9}),
        ]
        found = []
        for table, compression in zip(tables, ("snappy", "none", "zstd"), strict=True):
            stream = io.BytesIO()
            pq.write_table(table, stream, compression=compression, store_schema=compression == "none")
            found.append(stream.getvalue())
        return found

    def read(self, data: bytes) -> None:
        from pipelines.convert.records import unpack_parquet

        path = self.folder / "x.parquet"
        path.write_bytes(data)
        with tempfile.TemporaryDirectory(dir=self.folder) as work:
            try:
                labels, _, _ = unpack_parquet(str(path), f"{work}/spool", 1 << 20)
            except UserError:
                raise
            except Exception as error:  # the process would end, and its caller say so
                raise UserError(str(error)) from None
            rows = np.load(f"{work}/spool.npy", allow_pickle=False)
            size = (Path(work) / "spool.bin").stat().st_size
            if len(rows) != len(labels) or (rows[:, 0] + np.maximum(rows[:, 1], 0) > size).any():
                raise Finding("images that lie outside the copy, or are not as many as the labels")


# -- images -----------------------------------------------------------------------------------------------------------


class Image(Target):
    """Images of every format that conversion and image folders take, by `prepare` and `decode_rgb`."""

    max_bytes = 2048

    def seeds(self) -> list[bytes]:
        picture = PIL.Image.fromarray(pixels(7, 6))
        forms = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
        found = []
        for form in forms:
            stream = io.BytesIO()
            picture.save(stream, form)
            found.append(stream.getvalue())
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        for mode, form, options in (("CMYK", "JPEG", {}), ("L", "JPEG", {"exif": exif}), ("P", "PNG", {}),
                                    ("RGBA", "PNG", {"exif": exif}), ("I;16", "PNG", {}),
                                    ("1", "TIFF", {})):  # fmt: skip
            stream = io.BytesIO()
            picture.convert("L").convert(mode).save(stream, form, **options)  # type: ignore[arg-type]
            found.append(stream.getvalue())
        return [*found, *(sample.data for sample in odd_jpegs())]

    def read(self, data: bytes) -> None:
        from pipelines.read.decode import decode_rgb
        from pipelines.read.folder import FolderSource
        from pipelines.read.image_prep import ConvertSettings, prepare
        from pipelines.read.turbojpeg import BadImage

        settings = ConvertSettings(max_pixels=MOST_PIXELS, size=4)
        for raw in (False, True):
            with contextlib.suppress(BadImage):
                made = prepare(data, settings, raw)
                if raw and len(made.payload) != 3 * made.width * made.height:
                    raise Finding("a raw image of another size than it says")
        path = self.folder / "images" / "class" / "x.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        source = FolderSource(str(path.parent.parent))
        (height,), (width,) = source.sizes(np.arange(1))
        if height * width > MOST_PIXELS:
            raise UserError("an image too large for fuzzing")
        if decode_rgb(source, 0).shape != (height, width, 3):
            raise Finding("pixels of another size than the file's header says")


# -- what training reads ----------------------------------------------------------------------------------------------


class Targets(Target):
    """A folder of stored targets: targets.json, byte 0, an epoch's file. A first byte of 1 asks for a right digest."""

    def seeds(self) -> list[bytes]:
        from std_fast.method.losses import targets_from_logits
        from std_fast.teachers.target_format import FORMAT, pack

        found = []
        for top_k in (0, 2):
            header = {"format": FORMAT, "fingerprint": {"run.seed": 0}, "classes": 5, "teachers": 2, "top_k": top_k}
            logits = torch.randn(8, 2, 5, generator=torch.Generator().manual_seed(0))
            words = pack(targets_from_logits(logits, 1.0 if top_k else None, top_k)).numpy().tobytes()
            found.append(b"\1" + json.dumps(header).encode() + b"\0" + words + bytes(16))
        return found

    def read(self, data: bytes) -> None:
        from std_fast.teachers.target_cache import TargetCache
        from std_fast.teachers.target_format import DIGEST_BYTES, read_header, unpack

        text, _, words = data[1:].partition(b"\0")
        (self.folder / "targets.json").write_bytes(text)
        (self.folder / "epoch-00000.targets").write_bytes(words)
        header = read_header(self.folder)
        if data[0] == 1 and len(words) > DIGEST_BYTES:
            digest = header.digest(0)
            digest.update(words[:-DIGEST_BYTES])
            (self.folder / "epoch-00000.targets").write_bytes(words[:-DIGEST_BYTES] + digest.digest())
        store = TargetCache(self.folder, header, 8, 4, header.top_k > 0)
        try:
            if store.stored(0):
                targets = unpack(torch.from_numpy(store.open(0).astype(np.uint16).view(np.int16)), header.top_k > 0)
                if targets.labels.min() < 0 or targets.labels.max() >= header.classes:
                    raise Finding("an answer outside the classes")
        finally:
            store.close()


class Checkpoint(Target):
    """A run's folder with one checkpoint, by `read_run`, `trained_student` and `restore`.

    A first byte of 1 asks for a right digest: the tensors and the metadata are as they are, and sealed anew.
    """

    max_bytes = 1 << 15

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from std_fast.config import recipe as recipes
        from std_fast.config.recipe import Recipe
        from std_fast.config.schema import from_dict
        from std_fast.training.build import build_student

        options = {"patch_size": 4, "dim": 4, "depth": 1, "token_dim": 4, "channel_dim": 4}
        shape = {"data": {"image_size": 8}, "student": {"name": "mixer", "options": options}, "run": {"device": "cpu"}}
        self.recipe = recipes.dump(from_dict(Recipe, shape))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = build_student(recipes.loads(self.recipe), 3)
        (folder / "checkpoints").mkdir()
        (folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters())

    def seeds(self) -> list[bytes]:
        from std_fast.runtime import checkpoint

        optimizer = self._optimizer()
        sum(p.sum() for p in self.student.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
        average = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}
        tensors = checkpoint.training_tensors(self.student, optimizer, average)
        meta = {
            "step": 3, "recipe": self.recipe, "seconds": {"train": 1.5}, "best": {"top1": 1.0, "step": 2}, "devices": 1,
            "costs": {"evaluate": 0.5}, "complete": False, "versions": {"torch": "2"}, "num_classes": 3,
            "class_names": ["a", "b", "c"],
        }  # fmt: skip
        path = self.folder / "seed.safetensors"
        few = {name: tensor for name, tensor in tensors.items() if not name.startswith("optim.")}
        odd = {"model.a": torch.zeros(0), "noDot": torch.zeros(2, dtype=torch.bool), "optim.b": torch.ones(())}
        found = []
        for content in (few, tensors, odd):
            checkpoint.save(path, content, meta)
            found.append(b"\1" + path.read_bytes())
        return [data for data in found if len(data) <= self.max_bytes]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        """Another value for one of the metadata's keys, or another type, shape or place of a tensor."""
        try:
            length = int.from_bytes(data[1:9], "little")
            header = json.loads(data[9 : 9 + length])
            meta = json.loads(header["__metadata__"]["std_fast"])
            if rng.random() < 0.6:
                key = rng.choice([*meta, "format", "digest"])
                meta[key] = rng.choice(ODD_VALUES)
                if rng.random() < 0.2:
                    del meta[key]
                header["__metadata__"]["std_fast"] = json.dumps(meta)
            else:
                name = rng.choice([name for name in header if name != "__metadata__"])
                entry = header.pop(name)
                change = rng.randrange(4)
                if change == 0:
                    kinds = "BOOL F4 F6_E2M3 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
                    entry["dtype"] = rng.choice(kinds.split())
                elif change == 1:
                    entry["shape"] = rng.choice(
                        ([], [0], [2**40], [*entry["shape"], 1], entry["shape"][::-1], [1] * 70)
                    )
                elif change == 2:
                    entry["data_offsets"][rng.randrange(2)] = rng.choice(
                        (0, 2**63, 2**64 - 1, rng.randrange(len(data)))
                    )
                else:
                    name = rng.choice(("", "model.", "optim.x", "optim.x:y", "ema", ".", "é:", "model.head.weight"))
                header[name] = entry
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return data
        text = json.dumps(header).encode()
        return data[:1] + len(text).to_bytes(8, "little") + text + data[9 + length :]

    def _sealed(self, data: bytes) -> bytes:
        import safetensors.torch

        from std_fast.runtime import checkpoint

        try:
            length = int.from_bytes(data[:8], "little")
            text = json.loads(data[8 : 8 + length])["__metadata__"]["std_fast"]
            meta = {key: value for key, value in json.loads(text).items() if key != "digest"}
            tensors = safetensors.torch.load(data)
            meta["digest"] = checkpoint.digest(tensors, meta)
            return safetensors.torch.save(tensors, {"std_fast": json.dumps(meta)})
        except Exception:  # whatever is wrong with it, the reader shall find out
            return data

    def read(self, data: bytes) -> None:
        from std_fast.runtime import checkpoint
        from std_fast.teachers.classifiers import read_run
        from std_fast.training.evaluate import trained_student

        content = self._sealed(data[1:]) if data[:1] == b"\1" else data[1:]
        (self.folder / "checkpoints" / "step-00000003.safetensors").write_bytes(content)
        found = checkpoint.newest(self.folder / "checkpoints")
        if found is None:
            raise UserError("no complete checkpoint")
        path, tensors, meta = found
        if meta["recipe"] != self.recipe:  # another model, which may be a large one
            read_run(self.folder)
            return
        trained_student(self.folder)
        checkpoint.restore(tensors, self.student, self._optimizer())


class Weights(Target):
    """A file of weights for a teacher or a student: a first byte of 1 for .safetensors, else .pth."""

    max_bytes = 1 << 13

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = torch.nn.Linear(2, 3)

    def seeds(self) -> list[bytes]:
        import argparse
        import pickle

        import safetensors.torch

        state = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
        new, old = io.BytesIO(), io.BytesIO()
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "args": argparse.Namespace(lr=1)}, new)
        torch.save(state, old, _use_new_zipfile_serialization=False)
        plain = pickle.dumps({"weight": [1, 2]}, 2)
        return [b"\1" + safetensors.torch.save(state), b"\0" + new.getvalue(), b"\0" + old.getvalue(), b"\0" + plain]

    def read(self, data: bytes) -> None:
        from std_fast.teachers.classifiers import load_weights, read_weights

        path = self.folder / ("w.safetensors" if data[:1] == b"\1" else "w.pth")
        path.write_bytes(data[1:])
        load_weights(self.model, read_weights(path), str(path))


class HubFolder(Target):
    """config.json of a teacher's folder as timm and the hub write it; the weights beside it are good ones."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import timm

        model = timm.create_model("test_resnet", num_classes=3)
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        self.config = (folder / "config.json").read_bytes()

    def seeds(self) -> list[bytes]:
        more = json.loads(self.config) | {"model_args": {"in_chans": 3, "checkpoint_path": "x.pth"}}
        return [self.config, json.dumps(more).encode()]

    def mutate(self, data: bytes, rng: random.Random) -> bytes:
        try:
            config = json.loads(data)
            inner = config["pretrained_cfg"] if rng.random() < 0.5 else config
            inner[rng.choice([*inner, "model_args", "num_classes"])] = rng.choice(
                (*ODD_VALUES, "hf-hub:a/b", "local-dir:.")
            )
            return json.dumps(config).encode()
        except (ValueError, LookupError, TypeError, RecursionError):
            return data

    def read(self, data: bytes) -> None:
        from std_fast.config.recipe import TeacherSpec
        from std_fast.teachers.teacher import build_teacher

        (self.folder / "config.json").write_bytes(data)
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        build_teacher(TeacherSpec(weights=str(self.folder)), 3, 32, mean, std, "distill.teachers.0")


class RunFolder(Target):
    """What `report` reads of a run: recipe.yaml, metrics.jsonl and summary.json, with byte 0 between them."""

    def seeds(self) -> list[bytes]:
        recipe = "summary: one\nrun: {batch: 8}\n"
        train = {
            "kind": "train",
            "step": 1,
            "samples": 8,
            "epoch": 0.1,
            "loss": 2.5,
            "images_per_second": 10.0,
            "lr": 0.1,
        }
        evaluation = {"kind": "eval", "step": 2, "samples": 16, "top1": 50.0, "loss": 2.0, "gpu_hours": 0.1}
        summary = {"steps": 2, "result": {"top1": 50.0}, "best": {"step": 2, "top1": 50.0}, "seconds": {"train": 1.0}}
        lines = "\n".join(map(json.dumps, (train, evaluation)))
        return ["\0".join((recipe, lines, json.dumps(summary))).encode()]

    def read(self, data: bytes) -> None:
        from std_fast.commands.report_data import read_runs

        parts = [*data.split(b"\0"), b"", b""]
        for name, content in zip(("recipe.yaml", "metrics.jsonl", "summary.json"), parts, strict=False):
            (self.folder / name).write_bytes(content)
        (run,) = read_runs([self.folder])
        run.seconds, run.last("loss")


TARGETS: dict[str, type[Target]] = {
    "beton": Beton,
    "ffcv": LoadingFfcv,
    "dali": LoadingDali,
    "manifest": Manifest,
    "recipe": RecipeFile,
    "labels": Labels,
    "devkit": Devkit,
    "tar": Tar,
    "parquet": Parquet,
    "image": Image,
    "target_cache": Targets,
    "checkpoint": Checkpoint,
    "weights": Weights,
    "hub_folder": HubFolder,
    "run_folder": RunFolder,
}


def quiet() -> None:
    """The readers' warnings are not of interest here."""
    logging.disable(logging.CRITICAL)
