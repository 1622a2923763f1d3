"""Holds every module's syntax tree to the rules of docs/architecture.md.

Each rule is a function of (path, source) that returns one line for each breach, so small sources test it too.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERYTHING = "everything"
PYTORCH = "benchmarks/pytorch_variants.py"  # the one file outside tests that may import torch, an optional extra
Check = Callable[[str, str], list[str]]


GROUND = ("types", "text_tables", "config")


def read_import_table(document: str) -> dict[str, set[str]]:
    """Package -> dotted names below kd_jax that it may import, from the table "Who may import whom".

    Every package may import itself and GROUND; the members of GROUND may only import what their rows say.
    """
    table: dict[str, set[str]] = {}
    section = document.split("## Who may import whom", 1)[1].split("\n## ", 1)[0]
    for package, cell in re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE):
        table[package] = {package} if package in GROUND else {package, *GROUND}
        for word in (word.strip() for word in cell.split(",")):
            if name := re.fullmatch(r"`([\w.]+)`", word):
                table[package].add(name.group(1))
            elif word == EVERYTHING:
                table[package].add(EVERYTHING)
            else:
                assert word in ("", "-"), f"docs/architecture.md: cannot read {word!r} in the row of {package}"
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
    """Imports of ours that the table does not allow. Files in configs/ import `config` and `types` alone."""
    parts = pathlib.PurePosixPath(path).with_suffix("").parts
    if parts[0] == "configs":
        package, allowed = "configs", {"config", "types"}
    elif parts[1].startswith("__"):  # kd_jax/__init__.py and __main__.py start before anything else is imported
        package, allowed = parts[1], set()
    else:
        package, allowed = parts[1], import_table().get(parts[1])
        if allowed is None:
            return [f"{path}: package {package!r} has no row in the table of docs/architecture.md"]
    problems = []
    for line, name in imported_modules(path, source):
        first, _, rest = name.partition(".")
        if first == "kd_jax" and rest and rest != "__version__" and EVERYTHING not in allowed:
            if not any(rest == target or rest.startswith(target + ".") for target in allowed):
                problems.append(f"{path}:{line}: {package} may not import {rest}")
        elif first in ("benchmarks", "configs", "docs", "tests") and parts[0] != first:
            problems.append(f"{path}:{line}: {first}/ is not in the wheel, so {package} may not import it")
    return problems


def check_nobody_imports_main(path: str, source: str) -> list[str]:
    """Imports of kd_jax.main from outside it; tests call commands, and the benchmark is one."""
    if path.startswith(("kd_jax/main/", "tests/", "benchmarks/")):
        return []
    return [
        f"{path}:{line}: nobody imports kd_jax.main"
        for line, name in imported_modules(path, source)
        if f"{name}.".startswith("kd_jax.main.")
    ]


def import_cycles(sources: dict[str, str]) -> list[str]:
    """One line for each group of modules that import each other, at whatever distance; sources: path -> source."""
    modules = {}
    for path in sources:
        parts = pathlib.PurePosixPath(path).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    # `from package import name` imports package.name where that is a module, and the package itself otherwise.
    graph = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for _, name in imported_modules(path, sources[path])
            if name in modules or name.rpartition(".")[0] in modules
        }
        for module, path in modules.items()
    }

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (module := waiting.pop()) not in seen:
                seen.add(module)
                waiting.extend(graph[module])
        return seen

    after = {module: reached(module) for module in graph}
    groups = {frozenset(other for other in after[one] if one in after[other]) for one in graph if one in after[one]}
    return sorted(f"import each other: {', '.join(sorted(group))}" for group in groups)


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
        ("kd_jax/trainer/loop.py", "from kd_jax.config import require\nfrom kd_jax.trainer import state\nimport jax\n"),
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
        ("kd_jax/config/base.py", "from kd_jax.models import encoder\n"),
        ("kd_jax/config/base.py", "from kd_jax.models import encoder_config\n"),
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
        ("configs/massive.py", "from kd_jax.models import encoder_config\n"),
        ("configs/massive.py", "from configs import quickstart\nfrom kd_jax.config import base\n"),
    ),
    "table, what is not in the wheel": (
        check_import_table,
        ("kd_jax", "configs"),
        ("kd_jax/main/study.py", "from configs import quickstart\n"),
        ("kd_jax/main/study.py", "from kd_jax.study import run\n"),
    ),
    "table, the start": (
        check_import_table,
        ("kd_jax", "configs"),
        ("kd_jax/__main__.py", "from kd_jax.main import command\n"),
        ("kd_jax/__init__.py", "import importlib\n"),
    ),
    "main": (
        check_nobody_imports_main,
        ("kd_jax", "configs", "benchmarks"),
        ("kd_jax/study/run.py", "import kd_jax.main.distill as distill\n"),
        ("kd_jax/main/study.py", "from kd_jax.main import distill\n"),
    ),
    "forbidden modules": (
        check_forbidden_modules,
        ("kd_jax", "benchmarks", "configs", "tests"),
        ("kd_jax/data/text/sources.py", "def read():\n    import torch.nn\n"),
        ("tests/models/test_encoder.py", "import torch\n"),
    ),
    "torch": (
        check_forbidden_modules,
        ("kd_jax", "benchmarks", "configs", "tests"),
        ("benchmarks/worker.py", "import torch\n"),
        (PYTORCH, "import torch\nimport torch.nn.functional as F\n"),
    ),
    "pickle": (
        check_forbidden_modules,
        ("kd_jax", "benchmarks", "configs", "tests"),
        ("tests/data/test_rows.py", "from pickle import loads\n"),
        ("kd_jax/data/text/sources.py", "import tensorflow_datasets as tfds\n"),
    ),
    "code from files": (
        check_no_code_from_files,
        ("kd_jax", "benchmarks", "configs", "tests"),
        ("kd_jax/data/text/tokenizer.py", "load(name, trust_remote_code=True)\n"),
        ("kd_jax/data/rows.py", "np.load(name, allow_pickle=False)\n"),
    ),
    "names": (
        check_module_name,
        ("kd_jax", "benchmarks", "configs", "tests"),
        ("kd_jax/data/text_utils.py", ""),
        ("kd_jax/data/text/utterances.py", ""),
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


# Sorted by name: parallel test processes must see the same order.
CHECKS: list[tuple[Any, ...]] = sorted({rule[:2] for rule in RULES.values()}, key=lambda rule: rule[0].__name__)


@pytest.mark.parametrize("check, folders", CHECKS)
def test_every_file_keeps_the_rule(check, folders):
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    problems = []
    for file in files:
        problems += check(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not problems, "\n" + "\n".join(problems)


def test_table_names_every_package_and_nothing_else():
    ours = {item.stem for item in (ROOT / "kd_jax").iterdir() if item.suffix in ("", ".py")}
    assert set(import_table()) == {name for name in ours if not name.startswith("__")}
    assert "models.encoder_config" in import_table()["config"]


def test_table_with_an_unreadable_cell_is_an_error():
    with pytest.raises(AssertionError, match="cannot read 'most of it' in the row of data"):
        read_import_table("## Who may import whom\n\n| `data` | `types`, most of it |\n")


def test_no_modules_import_each_other():
    files = sorted((ROOT / "kd_jax").rglob("*.py"))
    sources = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    assert import_cycles(sources) == []


def test_cycles_are_found_at_any_distance_and_through_packages():
    sources = {
        "kd_jax/a.py": "from kd_jax import b\n",
        "kd_jax/b.py": "def late():\n    import kd_jax.c.d\n",
        "kd_jax/c/__init__.py": "",
        "kd_jax/c/d.py": "from kd_jax.a import name\nfrom kd_jax.c import e\n",
        "kd_jax/c/e.py": "import json\n",
    }
    assert import_cycles(sources) == ["import each other: kd_jax.a, kd_jax.b, kd_jax.c.d"]
    assert import_cycles(sources | {"kd_jax/b.py": "from kd_jax.c import e\n"}) == []
