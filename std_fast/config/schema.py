"""Typed configuration from dataclasses: plain values in, errors that name the field, plain values out.

Knows nothing of recipes; `recipe.py` has the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal, Union

import yaml

from pipelines.errors import UserError
from pipelines.options import opt as opt

MAX_YAML = 1 << 20  # characters
MAX_VALUES = 100_000


def require(condition: bool, where: str, message: str) -> None:
    """UserError naming the field unless `condition`."""
    if not condition:
        raise UserError(f"{where}: {message}")


def from_dict(cls: type, data: Any, where: str = "") -> Any:
    """Builds dataclass `cls` from plain values. UserError names the field for unknown keys and wrong types."""
    if not isinstance(data, dict):
        raise UserError(f"{where or 'recipe'}: expected a section with keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise UserError(f"{path}: unknown key; did you mean {near[0]!r}? (known: {', '.join(sorted(known))})")
        values[key] = _convert(hints[key], value, path)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        value = "none" if value is None and "none" in args else value  # an unquoted none or off in YAML
        value = "off" if value is False and "off" in args else value
        if value not in args:
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}.{i}") for i, v in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    try:
        if hint is float and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)  # YAML reads 1e-3 as a string
        if hint is int and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value)) if not isinstance(value, int) else value
    except (TypeError, ValueError, OverflowError):
        pass
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is dict and isinstance(value, dict) and _plain(value):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def read_yaml(text: str, where: str) -> Any:
    """Plain values from YAML, tags of Python's refused. UserError for what is no YAML, or expands beyond all use.

    A few lines of aliases to aliases can stand for any number of values, and so can merges (`<<`); and the composer
    calls itself for each level. So the document's size with all aliases written out is counted before it is built.
    """
    try:
        if len(text) > MAX_YAML:
            raise yaml.YAMLError(f"{len(text)} characters, more than {MAX_YAML}")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > MAX_VALUES:
                raise yaml.YAMLError(f"more than {MAX_VALUES} values, all aliases written out")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError(f"{where}: cannot be read as YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # PyYAML lets what its constructors meet through, such as the 13th month of a date, or `=` where a list is due
        raise UserError(f"{where}: cannot be read as YAML ({' '.join(str(error).split())})") from None


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a node stands for; infinite for one that holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _plain(value: Any) -> bool:
    """Whether it is one that JSON can say too: no date, no set, no bytes, only words as keys."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def to_dict(recipe: Any) -> dict:
    """Plain values (lists, not tuples), ready for YAML and JSON; `from_dict` reads them back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(recipe)


def merge(under: dict, over: dict) -> dict:
    """`over` on top of `under`, section by section; everything else is replaced whole."""
    out = dict(under)
    for key, value in over.items():
        whole = key == "options" or not (isinstance(value, dict) and isinstance(out.get(key), dict))
        out[key] = value if whole else merge(out[key], value)
    return out


def set_dotted(data: dict, dotted: str, text: str) -> None:
    """`set_dotted(d, "distill.teachers.0.weights", "runs/t")`; the value is read as YAML. Lists take an index."""
    value = read_yaml(text, f"--{dotted}")
    keys = dotted.split(".")
    node: Any = data
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(node, list):
            if not (key.isdigit() and int(key) <= len(node)):
                raise UserError(f"--{dotted}: {key!r} is no place in a list of {len(node)}")
            if int(key) == len(node):
                node.append({})
            key = int(key)  # type: ignore[assignment]
        elif not isinstance(node, dict):
            raise UserError(f"--{dotted}: {'.'.join(keys[:i])} is a single value, it has no {key!r}")
        if last:
            node[key] = value
        else:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = [] if keys[i + 1].isdigit() else {}
            node = node[key]


def difference(one: Any, two: Any, where: str = "") -> list[str]:
    """Dotted names of the fields in which two recipes (or sections) differ."""
    names = []
    for f in dataclasses.fields(one):
        a, b, path = getattr(one, f.name), getattr(two, f.name), f"{where}.{f.name}" if where else f.name
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            names += difference(a, b, path)
        elif a != b:
            names.append(path)
    return names


def describe(cls: type, where: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, default, text) of every field, for `--help`."""
    rows = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        path = f"{where}.{f.name}" if where else f.name
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            rows += describe(type(default), path)
        else:
            rows.append((path, str(default), f.metadata.get("help", "")))
    return rows
