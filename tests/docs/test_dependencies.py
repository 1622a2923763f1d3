"""Every import is a declared dependency, and the locks hold the dependencies and agree."""

import functools
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import pytest

import kd_jax
from tests.docs.test_architecture import PYTORCH, imported_modules

EMBEDDED = "kd_jax/data/embedded/"  # the only place that imports packages of the extra demo
ROOT = pathlib.Path(__file__).resolve().parents[2]


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
    ours = {"kd_jax", "benchmarks", "configs", "docs", "tests"}
    problems = []
    for line, name in imported_modules(path, source):
        first = name.split(".")[0]
        if first not in ours | sys.stdlib_module_names:
            owners = {normalized(owner) for owner in installed_distributions().get(first, [first])}
            if not owners & declared:
                problems.append(f"{path}:{line}: {first} is not among the dependencies in pyproject.toml")
    return problems


@pytest.mark.parametrize(
    "folder, extras", [("kd_jax", ()), ("benchmarks", ()), ("configs", ()), ("tests", ("dev", "demo", "parity"))]
)
def test_every_import_is_a_declared_dependency(folder, extras):
    direct = project()["dependencies"] + [item for name in extras for item in project()["optional-dependencies"][name]]
    declared = {normalized(requirement) for requirement in direct}
    demo = {normalized(requirement) for requirement in project()["optional-dependencies"]["demo"]}
    problems = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        optional = {"torch"} if path == PYTORCH else demo if path.startswith(EMBEDDED) else set()
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
    names = ("requirements.txt", "requirements-demo.txt", "requirements-dev.txt")  # each contains those before it
    plain, demo, dev = locks = [locked_versions(name) for name in names]
    extras = project()["optional-dependencies"]
    for lock, direct in zip(locks, (project()["dependencies"], extras["demo"], extras["dev"]), strict=True):
        for requirement in direct:
            pins = lock.get(normalized(requirement), set())
            assert pins, f"{requirement} is missing: make the lock again with the command in its first lines"
            if "==" in requirement:
                assert pins == {"==" + requirement.split("==")[1]}, f"{requirement} is locked as {pins}"
    for smaller, larger, file in ((plain, demo, names[1]), (demo, dev, names[2])):
        for name, pins in smaller.items():
            assert larger.get(name, set()) == pins, f"{name}: {file} and the lock that it contains differ"
    assert not {"torch", "tensorflow"} & set(dev)
    assert not {normalized(requirement) for requirement in extras["demo"]} & set(plain)


def test_every_file_with_a_version_has_the_same():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert kd_jax.__version__ == project()["version"]
    assert f"\nversion: {kd_jax.__version__}\n" in citation


def test_pre_commit_has_the_locked_ruff():
    (pin,) = locked_versions("requirements-dev.txt")["ruff"]
    assert f"rev: v{pin.removeprefix('==')}\n" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
