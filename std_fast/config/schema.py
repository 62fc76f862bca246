"""Typed configuration from dataclasses: plain values in, errors that name the field, plain values out.

Knows nothing of recipes; `recipe.py` has the fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Collection
from typing import Any, Literal, Union

import yaml

from pipelines.errors import FieldError, UserError, did_you_mean
from pipelines.options import opt as opt

MAX_YAML = 1 << 20  # characters
MAX_VALUES = 100_000


def require(condition: bool, where: str, message: str) -> None:
    """UserError naming the field unless `condition`."""
    if not condition:
        raise UserError(f"{where}: {message}")


class Word(str):
    """A word as it was typed, on the command line or unquoted in a file. `where` names its place in messages.

    A text field takes it as it is; for fields of other types `from_dict` reads it as YAML.
    """

    where: str

    def __new__(cls, text: str, where: str) -> Word:
        word = super().__new__(cls, text)
        word.where = where
        return word


class UnknownKey(UserError):
    """A key that no field has; `wanted` is the dotted name of what was to be set there."""

    def __init__(self, path: str, value: Any, known: Collection[str]) -> None:
        hint = did_you_mean(path.rpartition(".")[2], known)
        super().__init__(f"{path}: unknown key{hint} (known: {', '.join(sorted(known))})")
        self.wanted = path
        while isinstance(value, dict) and value:
            key, value = next(iter(value.items()))
            self.wanted += f".{key}"


def from_dict(cls: type, data: Any, where: str = "", base: Any = None) -> Any:
    """Builds dataclass `cls` from plain values and `Word`s; fields that are not in them are as in `base`.

    By default they are as `cls` has them: a section's fields as in the default of that section.

    Raises:
        UserError: an unknown key (`UnknownKey`) or a value of the wrong type; names the field.
    """
    data = _opened(data)
    if not isinstance(data, dict):
        raise UserError(f"{where or 'recipe'}: expected a section with keys, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise UnknownKey(path, value, known)
        factory = known[key].default_factory
        default = getattr(base, key) if base is not None else None if factory is dataclasses.MISSING else factory()
        values[key] = _convert(hints[key], value, path, default)
    try:
        return cls(**values) if base is None else dataclasses.replace(base, **values)
    except FieldError as error:
        raise UserError(f"{where}.{error.field}: {error.reason}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if plain_value(value) is None and type(None) in args:
            return None
        words = [word for a in args if typing.get_origin(a) is Literal for word in typing.get_args(a)]
        if value in words:
            return str(value)
        kind = next(a for a in args if a is not type(None) and typing.get_origin(a) is not Literal)
        try:
            return _convert(kind, value, where)
        except UserError as error:
            raise (UserError(f"{error}, or write {' or '.join(words)}") if words else error) from None
    if origin is Literal:
        return _choice(args, value, where)
    if hint in (str, int, float):
        return _text_or_number(hint, value, where)
    if origin is tuple:
        value = _opened(value)
        if not isinstance(value, (list, tuple)):
            several = 1 if args[-1] is Ellipsis or "," in str(value) else len(args)
            raise UserError(f"{where}: expected a list, got {value!r}; write [{', '.join([str(value)] * several)}]")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}.{i}") for i, v in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}.{i}") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where, default)
    value = plain_value(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is dict and isinstance(value, dict) and _plain(value):
        return value
    if hint is dict and isinstance(value, str) and "=" in value:
        raise UserError(f"{where}: expected names and values, got {value!r}; write {{{value.replace('=', ': ')}}}")
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _choice(choices: tuple, value: Any, where: str) -> Any:
    """One of a Literal's values: as typed, or as YAML reads an unquoted on, off, yes, no or null."""
    if value not in choices:
        read = plain_value(value)
        words = {True: ("on", "yes", "true"), False: ("off", "no", "false")}[read] if isinstance(read, bool) else ()
        value = next((choice for choice in choices if choice in words or (choice == "none" and read is None)), value)
    if value not in choices:
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}")
    return choices[choices.index(value)]


def _text_or_number(hint: type, value: Any, where: str) -> Any:
    """The text as typed; a number as Python reads it, so that 0123 is 123 and 12:30 none."""
    wrong = UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong
    if hint is str:
        if str(value).startswith("~"):  # a folder of that name is easily removed with another one
            raise UserError(f"{where}: {value!r}: ~ is not expanded here; write the path of your home folder")
        return str(value)
    try:
        if hint is int and isinstance(value, str) and value.strip().lstrip("+-").isdigit():
            return int(value)  # more digits than a float has
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise wrong
    return number if hint is float else value if isinstance(value, int) else int(number)


def _opened(value: Any) -> Any:
    """A section or list that was typed as one word, its own words as they were typed; anything else as it is."""
    return read_yaml(str(value), value.where, words=True) if isinstance(value, Word) else value


def plain_value(value: Any) -> Any:
    """`value` with each `Word` in it as YAML reads it, keys included."""
    if isinstance(value, Word):
        return read_yaml(str(value), value.where)
    if isinstance(value, dict):
        return {plain_value(key): plain_value(item) for key, item in value.items()}
    return [plain_value(item) for item in value] if isinstance(value, list) else value


_DIGITS = "[0-9]+(_[0-9]+)*"
_NUMBERS = {
    "int": rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": rf"[-+]?(\.{_DIGITS}|{_DIGITS}(\.({_DIGITS})?)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""YAML 1.2's numbers, and Python's underscores: in PyYAML's 1.1, 010 is 8, 1e3 text, 12:30 a number"""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers, and dates as text; truth values are still those of 1.1: on, off, yes, no."""

    where = ""
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value
        if re.fullmatch(_NUMBERS["int"], text):
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))

    def word(self, node: yaml.ScalarNode) -> Word:
        return Word(node.value, self.where)


class _WordLoader(_Loader):
    """The same, with unquoted numbers and truth values as `Word`s."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which is a number in YAML 1.2."""


for _kind, _pattern in _NUMBERS.items():
    for _class in (_Loader, _WordLoader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"({_pattern})\Z"), "-+.0123456789")
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.number)
for _kind in ("bool", "timestamp", *_NUMBERS):
    _WordLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _WordLoader.word)


def write_yaml(values: Any) -> str:
    """Plain values as YAML that `read_yaml` reads back to the same, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, where: str, words: bool = False) -> Any:
    """Plain values from YAML, tags of Python's refused. UserError for what is no YAML, or expands beyond all use.

    With `words`, unquoted numbers and truth values are `Word`s, for `from_dict`.

    A few lines of aliases to aliases can stand for any number of values, and so can merges (`<<`); and the composer
    calls itself for each level. So the document's size with all aliases written out is counted before it is built.
    """
    try:
        if len(text) > MAX_YAML:
            raise yaml.YAMLError(f"{len(text)} characters, more than {MAX_YAML}")
        loader = (_WordLoader if words else _Loader)(text)
        loader.where = where
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > MAX_VALUES:
                raise yaml.YAMLError(f"more than {MAX_VALUES} values, all aliases written out")
            if twice := _repeated(node):
                raise yaml.YAMLError(f"line {twice.start_mark.line + 1} repeats the key {twice.value!r}; keep one")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise UserError(f"{where}: cannot be read as YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # PyYAML lets what its constructors meet through, such as `!!int x`, or `=` where a list is due
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


def _repeated(node: yaml.Node) -> yaml.ScalarNode | None:
    """The first key that a mapping has twice: YAML would silently keep the last value."""
    if not isinstance(node, yaml.CollectionNode):
        return None
    seen = set()
    for part in node.value:
        key, *inner = part if isinstance(node, yaml.MappingNode) else ("", part)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                return key
            seen.add(key.value)
        for child in inner:
            if found := _repeated(child):
                return found
    return None


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
    """`over` on top of `under`, section by section; everything else is replaced."""
    out = dict(under)
    for key, value in over.items():
        replaced = key == "options" or not (isinstance(value, dict) and isinstance(out.get(key), dict))
        out[key] = value if replaced else merge(out[key], value)
    return out


def set_dotted(data: dict, dotted: str, text: str) -> None:
    """`set_dotted(d, "distill.teachers.0.weights", "runs/t")`; `from_dict` reads the `Word`. Lists take an index."""
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
            node[key] = Word(text, f"--{dotted}")
        else:
            inner = _opened(node[key] if isinstance(node, list) else node.get(key))  # type: ignore[call-overload]
            node[key] = inner if inner is not None else [] if keys[i + 1].isdigit() else {}
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


def describe(section: Any, where: str = "") -> list[tuple[str, str, str]]:
    """(dotted name, default as one types it, text) of every field of a dataclass or an instance, for `--help`.

    Fields of the items of a list, such as a teacher's, have `N` in the item's place.
    """
    rows = []
    defaults = section() if isinstance(section, type) else section
    hints = typing.get_type_hints(type(defaults))
    for f in dataclasses.fields(defaults):
        hint, default, path = hints[f.name], getattr(defaults, f.name), f"{where}.{f.name}" if where else f.name
        if dataclasses.is_dataclass(default):
            rows += describe(default, path)
            continue
        typed = default or "''" if isinstance(default, str) else json.dumps(default)
        text = f.metadata.get("help", "")
        item = typing.get_args(hint)[:1]
        if choices := [kind for kind in (hint, *item) if typing.get_origin(kind) is Literal]:
            text += f" ({', '.join(map(str, typing.get_args(choices[0])))})"
        rows.append((path, typed, text))
        if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(item[0]):
            rows += describe(item[0], f"{path}.N")
    return rows
