"""Verbs about data: convert, inspect, verify, warm, preview."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipelines.errors import UserError, printable
from std_fast.commands.arguments import Parser, Verb, add_json, add_recipe, show

COUNTED = {
    "samples": "images stored",
    "kept": "JPEGs as they were",
    "encoded": "encoded as JPEG",
    "raw": "as RGB values",
    "resized": "reduced to --size",
    "turned": "turned upright",
    "faults": "left out (see the manifest's faults)",
    "ignored": "other entries passed over (see its ignored)",
}
"""words for a manifest's counts"""


def add_convert(parser: Parser) -> None:
    from pipelines.convert.job import ON_ERROR, ConvertSettings

    parser.add_argument(
        "src", help="image folder SRC/CLASS/*, ImageNet's tars, tar shards, parquet or CIFAR's files; a path or a URL"
    )
    parser.add_argument("dst", help="the .beton to write")
    for field in fields(ConvertSettings):
        text = f"{field.metadata['help']} [{field.default}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, help=text)
    parser.add_argument("--workers", type=int, default=0, help="processes [one per core]")
    parser.add_argument(
        "--on-error", choices=ON_ERROR, default="stop", help="what to do about unreadable images [stop]"
    )
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="convert part I (from 0) of N, one beton each")
    add_json(parser)


def convert(args: argparse.Namespace) -> None:
    from pipelines.convert.job import ConvertSettings
    from pipelines.convert.job import convert as run_conversion
    from std_fast.config.schema import from_dict
    from std_fast.runtime.metrics import Progress

    given = {f.name: value for f in fields(ConvertSettings) if (value := getattr(args, f.name)) is not None}
    settings = from_dict(ConvertSettings, {name: None if value == "none" else value for name, value in given.items()})
    part, slash, parts = args.shard.partition("/")
    if not (slash and part.isdigit() and parts.isdigit()):
        raise UserError(f"--shard: {args.shard!r} is not I/N, such as 0/4")
    bar: list[Progress] = []

    def progress(now: Any) -> None:  # of pipelines.convert.job
        if not bar:
            bar.append(Progress("converted", now.total, "images"))
        bar[0].update(now.done)
        rate = f"{now.rate:.0f} images/s, {now.seconds_left:.0f} s left, " if now.phase == "converting" else ""
        bar[0].note(now.done, f"{now.phase}: {rate}{now.estimated_bytes / 1e6:.0f} MB in the end")

    try:
        manifest = run_conversion(
            args.src,
            args.dst,
            settings=settings,
            workers=args.workers,
            on_error=args.on_error,
            shard=(int(part), int(parts)),
            progress=progress,
        )
    finally:
        for one in bar:
            one.close()
    counts = manifest["counts"]
    words = ", ".join(f"{counts[name]:,} {text}" for name, text in COUNTED.items() if counts.get(name))
    show(args, manifest, f"{args.dst}: {json.dumps(counts)}\n{words}", kept=f"{args.dst}.json")


def _on_disk(path: str) -> str:
    """The beton's path, in the cache where it is a URL."""
    from pipelines.read.remote import cached, is_url

    if not is_url(path):
        return path
    found = cached(path)
    if len(found) > 1:
        raise UserError(f"{path}: several files; give one")
    return found[0]


def add_inspect(parser: Parser) -> None:
    parser.add_argument("path", help="a .beton, or the URL of one in the cache (see warm)")
    parser.add_argument("--sheet", default="", metavar="PNG", help="draw a contact sheet of its images")
    add_json(parser)


def inspect(args: argparse.Namespace) -> None:
    from pipelines.convert.job import classes_in_words
    from pipelines.convert.verify import inspect as contents
    from pipelines.convert.verify import sample_sheet

    path = _on_disk(args.path)
    data = contents(path)
    if args.sheet:
        sample_sheet(path, args.sheet)
        data["sheet"] = args.sheet
    names = data["class_names"] and classes_in_words(data["class_names"])
    show(args, data, "\n".join(_fields(data | {"class_names": names})))


def _fields(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`key: value` of each field; those of a manifest, which nests, as `manifest.key: value`."""
    for key, value in data.items():
        if isinstance(value, dict) and (prefix or key == "manifest"):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield printable(f"{prefix}{key}: {value}")


def add_verify(parser: Parser) -> None:
    parser.add_argument("path", help="a .beton, or the URL of one in the cache (see warm)")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    add_json(parser)


def verify(args: argparse.Namespace) -> int:
    from pipelines.convert.verify import verify as check

    faults = check(_on_disk(args.path), decode=args.decode)
    show(args, {"path": args.path, "faults": faults}, "\n".join(faults) or f"{args.path}: complete")
    return 1 if faults else 0


def add_warm(parser: Parser) -> None:
    parser.add_argument("path", help="a .beton, or its URL: it is copied to STD_FAST_CACHE [~/.cache/std_fast]")
    add_json(parser)


def warm(args: argparse.Namespace) -> None:
    from pipelines.convert.warm import warm as read_through

    data = read_through(args.path)
    show(args, data, "\n".join(f"{key}: {value}" for key, value in data.items()))


def add_preview(parser: Parser) -> None:
    add_recipe(parser)
    parser.add_argument("--out", default="preview.png", help="the PNG to write [preview.png]")
    parser.add_argument("--images", type=int, help="how many of the first epoch's first images [64, or all]")


def preview(args: argparse.Namespace) -> None:
    from std_fast.config import recipe as recipes

    recipe = recipes.load(args.recipe, args.overrides)

    from std_fast.commands.preview import preview as draw

    draw(recipe, Path(args.out), args.images)
    print(args.out)


VERBS = {
    "convert": Verb(convert, add_convert, "image folder, tars, parquet or CIFAR files to .beton"),
    "inspect": Verb(inspect, add_inspect, "what a .beton holds"),
    "verify": Verb(verify, add_verify, "whether a .beton is complete and as its manifest says"),
    "warm": Verb(warm, add_warm, "read a .beton into the page cache, one at a URL into the cache folder first"),
    "preview": Verb(preview, add_preview, "draw what a student sees: a contact sheet of augmented images"),
}
