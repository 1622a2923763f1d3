"""Holds the syntax trees to the rules of docs/architecture.md, and the locks to pyproject.toml.

Each rule is a function of (path, source) that gives one line for each breach, so it can be tried on small sources too.
"""

import ast
import functools
import importlib.metadata
import pathlib
import re
import sys
import tomllib
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERYTHING = "everything"
PYTORCH = "benchmarks/pytorch_variants.py"  # what the benchmark compares with, when the extra is installed
Check = Callable[[str, str], list[str]]


def read_import_table(document: str) -> dict[str, set[str]]:
    """Package -> dotted names below kd_jax that it may import, from the table "Who may import whom"."""
    table = {}
    section = document.split("## Who may import whom", 1)[1].split("\n## ", 1)[0]
    for row in re.findall(r"^\| `(\w+)` \| (.+) \|$", section, flags=re.MULTILINE):
        package, words = row[0], re.sub(r"\(.*?\)", "", row[1].split(";")[0])
        table[package] = allowed = set()
        for word in (word.strip() for word in words.split(",")):
            if name := re.fullmatch(r"`([\w.]+)`", word):
                allowed.add(name.group(1))
            elif word == "itself":
                allowed.add(package)
            elif word == EVERYTHING:
                allowed.add(EVERYTHING)
            else:
                assert word == "nothing", f"docs/architecture.md: cannot read {word!r} in the row of {package}"
    return table


@functools.cache
def import_table() -> dict[str, set[str]]:
    return read_import_table((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def imported_modules(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, inside functions too; `from a import b` gives a.b, as b may be a module."""
    package = pathlib.PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def check_import_table(path: str, source: str) -> list[str]:
    """Imports of ours that the table does not allow. The files in configs/ stand where `config` stands."""
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    package = "config" if parts[0] == "configs" else parts[1]
    if parts == ("kd_jax", "__init__"):
        allowed = set()
    elif package in import_table():
        allowed = import_table()[package]
    else:
        return [f"{path}: package {package!r} has no row in the table of docs/architecture.md"]
    problems = []
    for line, name in imported_modules(path, source):
        first, _, rest = name.partition(".")
        if first == "kd_jax" and rest and rest != "__version__" and EVERYTHING not in allowed:
            if not any(rest == target or rest.startswith(target + ".") for target in allowed):
                problems.append(f"{path}:{line}: {package} may not import {rest}")
        elif first == "configs" and parts[0] != "configs" and EVERYTHING not in allowed:
            problems.append(f"{path}:{line}: {package} may not import configs")
        elif first == "tests":
            problems.append(f"{path}:{line}: nobody imports tests")
    return problems


def check_nobody_imports_main(path: str, source: str) -> list[str]:
    """Imports of kd_jax.main from outside it, tests excepted: a command's test calls the command."""
    if path.startswith(("kd_jax/main/", "tests/")):
        return []
    return [
        f"{path}:{line}: nobody imports kd_jax.main"
        for line, name in imported_modules(path, source)
        if f"{name}.".startswith("kd_jax.main.")
    ]


def check_forbidden_modules(path: str, source: str) -> list[str]:
    """TensorFlow and everything that runs code out of data; torch only in tests and in the one file that is measured
    against it.
    """
    forbidden = {"tensorflow", "tensorflow_text", "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    forbidden |= set() if path.startswith("tests/") or path == PYTORCH else {"torch"}
    return [
        f"{path}:{line}: {name.split('.')[0]} is not imported here"
        for line, name in imported_modules(path, source)
        if name.split(".")[0] in forbidden
    ]


def check_no_code_from_files(path: str, source: str) -> list[str]:
    """trust_remote_code and allow_pickle may only be passed as a plain False."""
    return [
        f"{path}:{node.value.lineno}: {node.arg} must be False"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword)
        and node.arg in ("trust_remote_code", "allow_pickle")
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]


def check_module_name(path: str, source: str) -> list[str]:
    """A shared concept has a name of its own."""
    names = pathlib.PurePosixPath(path).with_suffix("").parts
    return [
        f"{path}: name the concept instead of {name!r}" for name in names if re.fullmatch(r"\w*util(s|ities)?", name)
    ]


def check_length(path: str, source: str) -> list[str]:
    """A file can be read in one sitting."""
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines, more than 400; split it by concept"] if lines > 400 else []


def check_no_config_defaults(path: str, source: str) -> list[str]:
    """Every key is declared in kd_jax/config/base.py; a default elsewhere would hide a mistyped one.

    Looked for on anything called config or job, and on parameters annotated as ConfigDict.
    """
    tree = ast.parse(source)
    config_names = {"config", "cfg", "job"}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None and "ConfigDict" in ast.unparse(node.annotation):
            config_names.add(node.arg)
    problems = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "setdefault"):
            target = node.func.value
        elif isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
            target = node.args[0]
        else:
            continue
        chain = set()
        while isinstance(target, ast.Attribute | ast.Subscript):
            chain |= {target.attr} if isinstance(target, ast.Attribute) else set()
            target = target.value
        chain |= {target.id} if isinstance(target, ast.Name) else set()
        if config_names & chain:
            problems.append(
                f"{path}:{node.lineno}: {ast.unparse(node)} hides a mistyped key; declare it in kd_jax/config/base.py"
            )
    return problems


def check_docstrings(path: str, source: str) -> list[str]:
    """Modules that hold anything, and their public functions and classes."""
    tree = ast.parse(source)
    if not path.startswith("kd_jax/") or not tree.body:
        return []
    problems = [] if ast.get_docstring(tree) else [f"{path}:1: the module has no docstring"]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            problems.append(f"{path}:{node.lineno}: {node.name} has no docstring")
    return problems


# (rule, the folders it holds in, the path and the source of a small breach and of its lawful neighbor)
RULES: dict[str, tuple[Check, tuple[str, ...], tuple[str, str], tuple[str, str]]] = {
    "table": (
        check_import_table,
        ("kd_jax", "configs"),
        ("kd_jax/trainer/loop.py", "def fit():\n    from kd_jax.steps import distill\n"),
        ("kd_jax/trainer/loop.py", "from kd_jax.types import Params\nfrom kd_jax.trainer import state\nimport jax\n"),
    ),
    "table, relative import": (
        check_import_table,
        ("kd_jax", "configs"),
        ("kd_jax/data/rows.py", "from ..models import heads\n"),
        ("kd_jax/data/rows.py", "from . import masking\nfrom ..types import Batch\n"),
    ),
    "table, one module of a package": (
        check_import_table,
        ("kd_jax", "configs"),
        ("configs/massive.py", "from kd_jax.models import encoder\n"),
        ("configs/massive.py", "from configs import base\nfrom kd_jax.models import presets\n"),
    ),
    "table, new package": (
        check_import_table,
        ("kd_jax", "configs"),
        ("kd_jax/serving/server.py", ""),
        ("kd_jax/losses/logits.py", "import kd_jax\n"),
    ),
    "table, configs": (
        check_import_table,
        ("kd_jax", "configs"),
        ("kd_jax/study/run.py", "import kd_jax.config.base\n"),
        ("kd_jax/main/study.py", "import kd_jax.config.base\n"),
    ),
    "main": (
        check_nobody_imports_main,
        ("kd_jax", "configs"),
        ("kd_jax/study/run.py", "import kd_jax.main.distill as distill\n"),
        ("kd_jax/main/study.py", "from kd_jax.main import distill\n"),
    ),
    "forbidden modules": (
        check_forbidden_modules,
        ("kd_jax", "configs", "tests"),
        ("kd_jax/data/text/sources.py", "def read():\n    import torch.nn\n"),
        ("tests/models/test_encoder.py", "import torch\n"),
    ),
    "torch": (
        check_forbidden_modules,
        ("kd_jax", "configs", "tests"),
        ("benchmarks/worker.py", "import torch\n"),
        (PYTORCH, "import torch\nimport torch.nn.functional as F\n"),
    ),
    "pickle": (
        check_forbidden_modules,
        ("kd_jax", "configs", "tests"),
        ("tests/data/test_rows.py", "from pickle import loads\n"),
        ("kd_jax/data/text/sources.py", "import tensorflow_datasets as tfds\n"),
    ),
    "code from files": (
        check_no_code_from_files,
        ("kd_jax", "configs", "tests"),
        ("kd_jax/data/text/tokenizer.py", "load(name, trust_remote_code=True)\n"),
        ("kd_jax/data/rows.py", "np.load(name, allow_pickle=False)\n"),
    ),
    "names": (
        check_module_name,
        ("kd_jax", "configs", "tests"),
        ("kd_jax/data/text_utils.py", ""),
        ("kd_jax/data/text/utterances.py", ""),
    ),
    "length": (
        check_length,
        ("kd_jax", "configs"),
        ("kd_jax/losses/logits.py", "\n" * 401),
        ("kd_jax/losses/logits.py", "\n" * 400),
    ),
    "config defaults": (
        check_no_config_defaults,
        ("kd_jax",),
        ("kd_jax/trainer/loop.py", "def fit(config):\n    return config.pretrain.get('steps', 10)\n"),
        ("kd_jax/trainer/loop.py", "def fit(config, table):\n    return table.get(config.pretrain.steps)\n"),
    ),
    "config defaults, by annotation": (
        check_no_config_defaults,
        ("kd_jax",),
        ("kd_jax/data/text/sources.py", "def read(source: ConfigDict):\n    return getattr(source, 'path', '')\n"),
        ("kd_jax/data/text/sources.py", "def read(source: dict):\n    return source.get('path', '')\n"),
    ),
    "docstrings": (
        check_docstrings,
        ("kd_jax",),
        ("kd_jax/losses/logits.py", '"""Losses."""\ndef kl_divergence():\n    pass\n'),
        (
            "kd_jax/losses/logits.py",
            '"""Losses."""\ndef _log_softmax():\n    pass\nclass Term:\n    """Sum and weight."""\n',
        ),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_tells_a_breach_from_lawful_code(rule):
    check, _, breach, lawful = RULES[rule]
    assert len(check(*breach)) == 1
    assert check(*lawful) == []


@pytest.mark.parametrize(
    "check, folders", sorted({rule[:2] for rule in RULES.values()}, key=lambda rule: rule[0].__name__)
)
def test_every_file_keeps_the_rule(check, folders):
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    problems = []
    for file in files:
        problems += check(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not problems, "\n" + "\n".join(problems)


def test_table_names_every_package_and_nothing_else():
    ours = {item.stem for item in (ROOT / "kd_jax").iterdir() if not item.stem.startswith("__")}
    assert set(import_table()) == ours
    assert "models.encoder_config" in import_table()["config"]


def test_table_with_an_unreadable_cell_is_an_error():
    with pytest.raises(AssertionError, match="cannot read 'most of it' in the row of data"):
        read_import_table("## Who may import whom\n\n| `data` | `types`, most of it |\n")


def normalized(requirement: str) -> str:
    """The distribution's name in `name[extra]>=1.0`, the way package indexes compare it."""
    match = re.match(r"[\w.-]+", requirement)
    assert match, f"{requirement!r} does not begin with a name"
    return re.sub(r"[-_.]+", "-", match.group()).lower()


@functools.cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


# Import name -> the distributions that provide it.
installed_distributions = functools.cache(importlib.metadata.packages_distributions)


def undeclared_imports(path: str, source: str, declared: set[str]) -> list[str]:
    """Imports of packages that pyproject.toml does not name, though another package may bring them."""
    ours = {"kd_jax", "configs", "tests", *(file.stem for file in (ROOT / "tests").glob("*.py"))}
    problems = []
    for line, name in imported_modules(path, source):
        first = name.split(".")[0]
        if first not in ours | sys.stdlib_module_names:
            owners = {normalized(owner) for owner in installed_distributions().get(first, [first])}
            if not owners & declared:
                problems.append(f"{path}:{line}: {first} is not among the dependencies in pyproject.toml")
    return problems


@pytest.mark.parametrize("folder, extras", [("kd_jax", ()), ("configs", ()), ("tests", ("dev", "parity"))])
def test_every_import_is_a_declared_dependency(folder, extras):
    direct = project()["dependencies"] + [item for name in extras for item in project()["optional-dependencies"][name]]
    declared = {normalized(requirement) for requirement in direct}
    problems = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        optional = {"torch"} if path == PYTORCH else set()
        problems += undeclared_imports(path, file.read_text(encoding="utf-8"), declared | optional)
    assert not problems, "\n" + "\n".join(problems)


def test_undeclared_imports_knows_import_names_from_package_names():
    source = "import json\nimport absl.flags\nimport yaml\nfrom kd_jax import types\n"
    assert undeclared_imports("kd_jax/config.py", source, {"absl-py", "pyyaml"}) == []
    assert len(undeclared_imports("kd_jax/config.py", source, {"absl-py"})) == 1


def locked_versions(name: str) -> dict[str, set[str]]:
    """Distribution -> its pins with their markers, in one lock."""
    pins: dict[str, set[str]] = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.lstrip().startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)(==[\w.]+( ; .+)?)", line.split("#")[0].strip())
            assert pin, f"{name}: {line!r} is not a version locked with =="
            pins.setdefault(normalized(pin.group(1)), set()).add(pin.group(2))
    return pins


def test_locks_hold_the_direct_dependencies_and_agree():
    locks = locked_versions("requirements.txt"), locked_versions("requirements-dev.txt")
    for lock, direct in zip(locks, (project()["dependencies"], project()["optional-dependencies"]["dev"]), strict=True):
        for requirement in direct:
            pins = lock.get(normalized(requirement), set())
            assert pins, f"{requirement} is missing: make the lock again with the command in its first lines"
            if "==" in requirement:
                assert pins == {"==" + requirement.split("==")[1]}, f"{requirement} is locked as {pins}"
    for name, pins in locks[0].items():
        assert locks[1].get(name, set()) == pins, f"{name}: requirements-dev.txt and requirements.txt differ"
    assert not {"torch", "tensorflow"} & set(locks[1])
