#!/usr/bin/env bash
# docs.sh [OUT]: writes the API reference as HTML, from the docstrings, into OUT (build/docs). PYTHON=... chooses the interpreter. A warning is an
# error, but for one kind: pdoc does not resolve the annotations of generated constructors (NamedTuple, inherited dataclass) and shows them as text.
set -euo pipefail
cd "$(dirname "$0")/.."
modules=$(for package in std_fast/*/ pipelines/*/; do [ ! -f "$package/__init__.py" ] || echo "${package%/}" | tr / .; done)
# shellcheck disable=SC2086 # a list of words
PYTHONPATH=$PWD exec "${PYTHON:-.venv/bin/python}" -W error -W 'ignore:Error parsing type annotation:UserWarning' \
  -m pdoc --docformat google -o "${1:-build/docs}" $modules std_fast.library
