"""The project itself: the order of imports, words, sizes, and that what the code needs is what its files install."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
OURS = ("std_fast", "pipelines", "benchmarks")
MODULE_OF = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "nvidia-dali-cuda120": "nvidia",
    "mlflow-skinny": "mlflow",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports() -> dict[str, set[str]]:
    return {module: imports_of(module) for module in FILES}


def imports_of(module: str) -> set[str]:
    """Full names of what the file imports, also inside functions; `from std_fast import cli` is std_fast.cli."""
    found = set()
    for node in ast.walk(tree_of(FILES[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return found


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


# Imports run one way


@pytest.mark.parametrize(
    "package, forbidden", [("pipelines", ("std_fast", "benchmarks")), ("std_fast", ("benchmarks",))]
)
def test_lower_packages_never_import_upper_ones(package, forbidden):
    wrong = {
        (m, name)
        for m, names in imports().items()
        for name in names
        if m.split(".")[0] == package and name.split(".")[0] in forbidden
    }
    assert not wrong
    assert any(m.split(".")[0] == package for m in imports())


ROOMS = (
    {"pipelines.errors", "pipelines.files", "pipelines.options", "pipelines.rng"},
    {"pipelines.sheet", "pipelines.untrusted"},
    {"pipelines.read", "std_fast.models"},
    {"pipelines.source", "pipelines.augment", "pipelines.convert", "pipelines.loaders", "std_fast.method"},
    {"pipelines"},
    {"std_fast.config", "std_fast.registry"},
    {"std_fast.runtime"},
    {"std_fast.teachers"},
    {"std_fast.training", "std_fast.library"},
    {"std_fast.commands"},
    {"std_fast.cli"},
    {"benchmarks"},
)
"""from the lowest to the highest: a module imports from its own room and from lower ones"""
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(module):
    parts = module.split(".")
    return parts[0] if module == "pipelines" or parts[0] == "benchmarks" else ".".join(parts[:2])


def test_rooms_import_one_way():
    rooms = {room_of(module) for module in FILES} - {"std_fast"}  # loads lazily
    assert rooms == set(LEVEL)
    wrong = [
        (importer, imported)
        for importer, names in imports().items()
        for imported in names
        if {room_of(importer), room_of(imported)} <= set(LEVEL)
        and room_of(importer) != room_of(imported)
        and LEVEL[room_of(imported)] >= LEVEL[room_of(importer)]
    ]
    assert not wrong


def test_no_import_cycle():
    below = {module: {n for n in names if n in FILES} for module, names in imports().items()}
    while free := {module for module, names in below.items() if not names}:
        below = {module: names - free for module, names in below.items() if module not in free}
    assert not below, f"in or above a cycle: {sorted(below)}"


def test_import_does_no_work():
    """Importing the package and the CLI loads nothing heavy: `std-fast --help` must answer at once."""
    heavy = {"torch", "numpy", "ffcv", "rich", "timm"}
    code = f"import sys, pipelines, std_fast.cli, std_fast.commands.doctor; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_recipe_is_checked_before_torch_is_imported():
    """A mistake in a field is an error at once, not after the seconds of the import."""
    verbs = ["train", "plan", "teach", "preview", "eval --teacher 0"]
    calls = "; ".join(f"main({[*verb.split(), 'digits_std', '--optim.lrr', '1']})" for verb in verbs)
    code = f"import sys; from std_fast.cli import main; {calls}; print(*sorted({{'torch', 'timm'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "" and done.stderr.count("optim.lrr: unknown key") == len(verbs)


# Words and sizes

TEXTS = sorted(
    path
    for path in [
        *ROOT.glob("*"),
        *(p for name in (*OURS, "docs", "examples", "scripts", "tests") for p in ROOT.glob(f"{name}/**/*")),
    ]
    if path.suffix in (".py", ".md", ".yaml", ".yml", ".sh", ".toml") or path.name in ("Makefile", "Dockerfile")
)
READ_OLD_FORMS = {"std_fast/config/legacy.py", "tests/unit/test_project.py", "tests/integration/test_upgrades.py"}
NO_TEXT_OF_OURS = ("tests/data/", "tests/fuzz/corpus/", "benchmarks/results/", "CHANGELOG.md", "docs/LICENCES.md")
OLD_WORDS = re.compile(
    r"(?<![A-Za-z])(TeacherAnswers|AnswerStore|answers_from_logits|distill\.answers|go_back|went_back|put_aside|learning_seconds"
    r"|BadSteps|_tell_bad|instead_of|owes_evaluation|let_go|try_out|AtHand|MovingAverage|_WITHOUT|_BEFORE|ALONE"
    r"|[Aa]nswers|[Tt]aught|[Mm]end(?:s|ed|ing)?|[Ff]igures|[Ww]hole(?! numbers?\b))(?![A-Za-z])"
)
"""old names, and words that have a plain technical one (targets, predictions, fix, metrics, complete)"""
OLD_NAMES = set("Beginning FREE Intact Keep LOW Mixed Pair Told Trained aside joined learned look tell told".split())
"""old names that are words of English too: no class, function, argument, variable or field has them"""
ONE_OF_EACH = {"Plan", "Taps", "Journal", "Progress", "Job", "_sync_folder", "contact_sheet"}
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_old_words_are_gone():
    texts = {str(path.relative_to(ROOT)): path for path in TEXTS}
    found = [
        f"{name}:{number}: {match[0]}"
        for name, path in texts.items()
        if name not in READ_OLD_FORMS and not name.startswith(NO_TEXT_OF_OURS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in OLD_WORDS.finditer(line)
    ]
    assert not found
    assert {"README.md", "std_fast/cli.py", "docs/DESIGN.md", "tests/unit/test_plan.py"} <= set(texts)


def names_defined(tree):
    """(line, name) of every class, function, argument, alias, and variable or attribute that is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.alias) and node.asname:
            yield 0, node.asname
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_no_name_of_the_code_is_an_old_one():
    paths = [path for path in TEXTS if path.suffix == ".py"]
    defined = [(path, line, name) for path in paths for line, name in names_defined(tree_of(path))]
    assert not [f"{path}:{line}: {name}" for path, line, name in defined if name in OLD_NAMES]
    ours = [
        node.name
        for path in FILES.values()
        for node in ast.walk(tree_of(path))
        if isinstance(node, DEFINITIONS) and node.name in ONE_OF_EACH
    ]
    assert len(ours) == len(set(ours)), f"defined twice: {ours}"


LARGEST = {"file": 400, "class": 200, "function": 60}
"""lines"""


def test_files_classes_and_functions_are_small():
    large = {}
    for path in FILES.values():
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        sizes = [("file", name, len(text.splitlines()))]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, DEFINITIONS):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                sizes.append((kind, f"{name}:{node.name}", node.end_lineno - node.lineno + 1))
        large |= {where: lines for kind, where, lines in sizes if lines > LARGEST[kind]}
    assert not large


# What is imported is what is installed


def test_third_party_imports_are_declared_and_the_other_way_round():
    used = (
        {name.split(".")[0] for names in imports().values() for name in names}
        - set(sys.stdlib_module_names)
        - set(OURS)
    )
    core = {MODULE_OF.get(n, n) for n in map(requirement_name, PROJECT["dependencies"])}
    optional = {MODULE_OF.get(n, n) for extra in EXTRAS.values() for n in map(requirement_name, extra)}
    # numba, llvmlite and cv2 come with FFCV, triton with torch; apex (amp_C is part of it) has no right name on PyPI;
    # trackio wants an older Pillow than ours
    assert used <= core | optional | {"numba", "llvmlite", "cv2", "triton", "apex", "amp_C", "trackio"}
    by_others = {"torchvision"}  # by timm
    assert core <= used | by_others, "a dependency that nothing imports"


def pins(name):
    """(package, version) of each line of constraints.txt, or of a lock, whose pins end in hashes."""
    lines = re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ \n]+)", (ROOT / name).read_text(encoding="utf-8"), re.M)
    assert lines
    return set(lines)


def test_constraints_hold_an_exact_version_of_everything_declared():
    pinned = pins("constraints.txt")
    declared = {requirement_name(r) for r in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]} - {"std-fast"}
    assert declared <= {name for name, _ in pinned}, "run make lock"
    assert {("torch", "2.11.0"), ("torchvision", "0.26.0"), ("timm", "1.0.31")} <= pinned


HOLDS = {"build": "pip", "demo": "torch", "ffcv": "ffcv", "dali": "nvidia-dali-cuda120", "dev": "pytest"}


@pytest.mark.parametrize("part, holds", HOLDS.items())
def test_a_lock_holds_its_part_at_the_versions_of_the_constraints_by_hash(part, holds):
    found = pins(f"scripts/{part}.lock")
    assert found <= pins("constraints.txt"), "run make lock"
    assert holds in {name for name, _ in found}
    entries = re.split(r"\n(?=\S)", (ROOT / f"scripts/{part}.lock").read_text(encoding="utf-8").strip())
    assert all("--hash=sha256:" in entry for entry in entries if "==" in entry)
    if part in EXTRAS:
        assert {requirement_name(r) for r in EXTRAS[part]} <= {name for name, _ in found}, "run make lock"


def test_environment_yml_names_every_package_of_the_design():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    by_conda = {requirement_name(r) for r in listed if isinstance(r, str)}
    design = "pytorch-gpu timm numpy nvidia-apex nvidia-dali-python opencv libjpeg-turbo pkg-config compilers"
    assert by_conda >= set(design.split())
    assert "opencv>=4.6,<5" in listed  # FFCV asks pkg-config for opencv4
    (by_pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    assert by_pip == ["-e ."], "a failing build of FFCV must not take the environment with it"
    missing = {requirement_name(r) for r in PROJECT["dependencies"]} - by_conda - {"torch"}
    assert not missing


def test_extras():
    assert EXTRAS["all"] == ["std-fast[ffcv,dali,trackers]"]


def test_console_script_and_packaged_recipes():
    module, _, name = PROJECT["scripts"]["std-fast"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setuptools["package-data"]["std_fast"]
    data = {path for path in (ROOT / "std_fast").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    packed = {path for pattern in patterns for path in (ROOT / "std_fast").glob(pattern)}
    assert data and data == packed, "a data file that an installed package would lack"


def test_the_files_that_the_design_names_are_there():
    text = (ROOT / "docs/DESIGN.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:pipelines|std_fast|benchmarks|tests)/[\w/.]*)`", text))
    assert len(named) > 15 and not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for path in FILES.values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


# The commands


def test_make_has_the_promised_targets():
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^make (\w+)", done.stdout, re.M))
    assert {"demo", "test", "lint", "clean"} <= listed


def test_shell_scripts_parse_and_are_executable():
    for script in (ROOT / "scripts/bootstrap.sh", ROOT / ".ci/run"):
        assert script.stat().st_mode & 0o111, script
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_bootstrap_refuses_an_unknown_goal():
    done = subprocess.run([ROOT / "scripts/bootstrap.sh", "tset"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "demo|image|test" in done.stderr
