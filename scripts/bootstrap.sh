#!/usr/bin/env bash
# bootstrap.sh demo|image|test|oldest|newest: makes .venv on a Linux machine with as little as make and bash on it, then stamps it .ready-GOAL.
#   demo  the package with FFCV      image  the same and DALI      test  the same and the developer's tools
#   oldest, newest  as test, but into .venv-GOAL and with the oldest torch that pyproject.toml allows, the newest that pip finds
# Missing system packages come from apt, as root or through sudo; where neither works, the one line to type is printed. FFCV and DALI are
# optional: without them one line says so and the rest is installed, except under CI (variable CI set), where every part must be there.
# PYTHON=... chooses the interpreter.
set -euo pipefail
trap 'exit 130' INT TERM # so that Ctrl-C during an optional part does not read as "that part failed, go on"
cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME # packages found there would count as installed

goal=${1:-}
case $goal in
demo) always=demo optional="ffcv" ;;
image) always=demo optional="ffcv dali" ;;
test | oldest | newest) always=dev optional="ffcv dali" ;;
*) echo "usage: $0 demo|image|test|oldest|newest" >&2 && exit 2 ;;
esac
venv=.venv constraints=constraints.txt
if [ "$goal" = oldest ] || [ "$goal" = newest ]; then # all but torch and what comes with it stays as it was tested
  venv=.venv-$goal constraints=.venv-$goal/constraints.txt
  mkdir -p "$venv"
  with_torch='^(torch|torchvision|triton|cuda-[a-z]+|nvidia-(cu|nccl|nvjitlink|nvshmem|nvtx)[a-z0-9-]*)=='
  kept=$(grep -vE "$with_torch" constraints.txt)
  [ "$goal" = newest ] || kept+=$(sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)",$/\n\1==\2.*/p' pyproject.toml)
fi
unfinished=$venv/.unfinished # there while pip is at work: an environment cut off in the middle is not trusted again

say() { printf 'bootstrap: %s\n' "$*" >&2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

# Debian's names of what is missing, found by asking for the thing itself, so that conda's or a hand-built one counts too.
missing_packages() {
  local python name
  if python=$(find_python); then
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$name-venv"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || echo "$name-dev"
  else
    echo python3 python3-venv python3-dev
  fi
  command -v g++ >/dev/null || echo g++ # FFCV, and torch.compile
  command -v pkg-config >/dev/null || echo pkg-config
  pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
  pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
}

apt_install() {
  local sudo="" log
  command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    sudo="sudo -n"
  fi
  say "installing system packages: $*"
  # shellcheck disable=SC2086 # an empty $sudo must vanish
  # `;` and not `&&`: one broken source of somebody else's makes `update` fail, and Debian's packages install all the same
  log=$($sudo env DEBIAN_FRONTEND=noninteractive bash -c '
    apt-get -q -o DPkg::Lock::Timeout=300 update
    apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"' apt "$@" 2>&1 </dev/null) ||
    { tail -n 20 <<<"$log" >&2 && return 1; }
}

packages=$(missing_packages | xargs)
if [ -n "$packages" ]; then
  # shellcheck disable=SC2086 # a list of words
  apt_install $packages || true
  packages=$(missing_packages | xargs)
  [ -z "$packages" ] || say "system packages are missing; type: sudo apt-get install -y --no-install-recommends $packages"
fi
python=$(find_python) || { say "no Python 3.10 or later: install one, or name it with PYTHON=/path/to/python3" && exit 1; }

pip() {
  "$venv/bin/python" -m pip install "$([ -t 2 ] && echo --progress-bar=on || echo -qq)" --disable-pip-version-check "$@"
}

# PART: installs what scripts/PART.lock lists and nothing else, by SHA-256; where the locks do not hold, by version alone.
part() {
  if [ -n "$hashed" ]; then
    pip --no-build-isolation --require-hashes -r "scripts/$1.lock"
  else
    pip -c "$constraints" --build-constraint "$constraints" -e ".$([ "$1" = demo ] || echo "[$1]")"
  fi
}

if [ -e "$unfinished" ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  say "making $venv with $python"
  "$python" -m venv --clear "$venv" >/dev/null || { say "cannot make $venv with $python" && exit 1; }
fi
touch "$unfinished"
[ "$venv" = .venv ] || printf '%s\n' "$kept" >"$constraints"
rm -f "$venv"/.ready-*
# pip unpacks gigabytes on the way, and /tmp may be a small file system in memory
export TMPDIR=$PWD/$venv/tmp
mkdir -p "$TMPDIR"
say "installing Python packages (about 5 GB with torch's CUDA libraries; minutes the first time)"
hashed=""
if [ "$venv" = .venv ] && [ "$(uname -m)" = x86_64 ] && "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then
  hashed=yes
else
  say "no hashes are kept for these files: versions alone hold them"
  pip -c "$constraints" --upgrade pip
fi
[ -z "$hashed" ] || pip --require-hashes -r scripts/build.lock
part "$always"
[ -z "$hashed" ] || pip --no-build-isolation --no-deps -e .
lacking=""
for extra in $optional; do
  if part "$extra" >"$venv/install-$extra.log" 2>&1 &&
    "$venv/bin/python" -c "import $([ "$extra" = ffcv ] && echo ffcv.libffcv || echo nvidia.dali)" >>"$venv/install-$extra.log" 2>&1; then
    continue
  fi
  lacking="$lacking $extra"
  say "no $extra here (why: $venv/install-$extra.log; all else works): $venv/bin/std-fast doctor tells what to install, then try again with: rm $venv/.ready-*"
done
rm -rf "$TMPDIR" "$unfinished"
if [ -n "$lacking" ] && [ -n "${CI:-}" ]; then
  for extra in $lacking; do tail -n 30 "$venv/install-$extra.log" >&2; done
  say "under CI every part must be there" && exit 1
fi
touch "$venv/.ready-$goal"
[ "$goal" != test ] || touch "$venv/.ready-demo"
