"""README.md and docs/: links, commands and keys in them exist; the hooks of the site."""

import importlib
import importlib.util
import pathlib
import re
import tomllib

import pytest
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:-m kd_jax\.main\.|\bkd-jax )(\w+)(?![\w{<\[$*])")


def loaded(path: str):
    """A Python file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / "docs" / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dead_links(text: str, folder: pathlib.Path) -> list[str]:
    """Relative links of a Markdown page, outside code, whose target does not exist."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose)
    relative = [link.split("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    return [link for link in relative if not (folder / link).exists()]


def shell_commands(text: str) -> list[str]:
    """The commands in a page's code blocks, continued lines joined."""
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in ("", "bash", "sh", "shell", "console")]
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def has_key(config: ConfigDict, key: str) -> bool:
    """Whether a dotted key exists; below an empty block, such as config.sources, users choose the names."""
    value = config
    for part in key.split("."):
        if not isinstance(value, ConfigDict):
            return False
        if part not in value:
            return len(value) == 0
        value = value[part]
    return True


def unknown_names(command: str) -> list[str]:
    """Modules, configs, keys and scripts in a shell command of the documentation that do not exist."""
    commands = {"init", *(path.stem for path in (ROOT / "kd_jax" / "main").glob("*.py"))}
    unknown = [name for name in COMMAND.findall(command) if name not in commands]
    unknown += [name for name in re.findall(r"\blaunch/[\w.-]+", command) if not (ROOT / name).exists()]
    file = re.search(r"--config=configs/(\w+)\.py(?::(\w+))?", command)
    if file is None:
        return unknown
    name = "kd_jax.config.base" if file[1] == "FILE" else f"configs.{file[1]}"  # FILE stands for any config
    if not (ROOT / f"{name.replace('.', '/')}.py").exists():
        return [*unknown, file[0]]
    module = importlib.import_module(name)
    config = module.get_config(file[2]) if file[2] else module.get_config()
    return unknown + [key for key in re.findall(r"--config\.([\w.]+)=", command) if not has_key(config, key)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_commands_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    assert dead_links(text, page.parent) == []
    assert [name for command in shell_commands(text) for name in unknown_names(command)] == []


def test_what_does_not_exist_is_seen():
    text = "[a](kd_jax/nowhere.py) [b](#here) [c](https://x.org) `[d](code)`\n![e](docs/none.png) [f](README.md#start)"
    assert dead_links(text, ROOT) == ["kd_jax/nowhere.py", "docs/none.png"]
    assert unknown_names("kd-jax distil --config=mine/config.py") == ["distil"]
    command = "python -m kd_jax.main.distil --config=configs/quickstart.py \\\n    --config.distill.stepz=1"
    page = f"```python\nx = 1\n```\n```\n{command}\n```\n"
    (command,) = shell_commands(page)
    assert unknown_names(command) == ["distil", "distill.stepz"]
    assert unknown_names("bash launch/start.sh") == ["launch/start.sh"]
    assert unknown_names("python -m kd_jax.main.study --config=configs/none.py --config.a=1") == [
        "--config=configs/none.py"
    ]


def table(page: str, heading: str) -> list[list[str]]:
    """Header and rows of the table below a heading of a page."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [header, *rows]


def test_each_feature_of_ours_is_held_by_a_test():
    header, *rows = table("README.md", "How it compares")
    assert rows and header[1] == "kd_jax"
    held = dict(table("docs/guarantees.md", "Tests")[1:])
    assert [row[0] for row in rows] == list(held), "README.md and docs/guarantees.md list the same features in order"
    for row in rows:
        assert len(row) == len(header), row
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held[row[0]])
        assert tests or not row[1].startswith("**Y"), f"{row[0]}: name its test in docs/guarantees.md"
        for file, name in tests:
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"


def test_the_lock_of_the_site_is_its_own_and_small():
    group = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["docs"]
    lock = re.findall(r"^([\w.-]+)==", (ROOT / "requirements-docs.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for requirement in group:
        assert re.split(r"[\[>=]", requirement)[0] in lock, f"{requirement}: make the lock again, see its first lines"
    assert not {"jax", "torch", "numpy"} & set(lock)  # docstrings are read, never imported


def test_links_out_of_docs_lead_to_the_repository_or_are_bare_text():
    outward_links = loaded("hooks/links.py").outward_links
    text = "See [keys](../kd_jax/types.py), [page](distillation.md), [none](../gone.py) and ![x](../y.png)."
    bare, missing = outward_links(text, "selection.md", "")
    assert bare == "See keys, [page](distillation.md), none and ![x](../y.png)." and missing == ["../gone.py"]
    linked, _ = outward_links(text, "selection.md", "https://example.org/kd/")
    assert "[keys](https://example.org/kd/blob/main/kd_jax/types.py)" in linked
    inside = "[up](../distillation.md)"
    assert outward_links(inside, "results/massive.md", "") == (inside, [])


def test_sections_of_the_readme_are_inserted_with_links_that_fit_the_page():
    with_sections = loaded("hooks/links.py").with_sections
    readme = "# X\n\n## A\n\n[a](docs/a.md) [b](configs/b.py) [c](https://c.org) [d](#a)\n\n## B\n\nb\n\n## C\n\nc\n"
    page, missing = with_sections("# P\n\n<!-- README: A; C -->\n\nend\n", readme)
    links = "[a](a.md) [b](../configs/b.py) [c](https://c.org) [d](#a)"
    assert page == f"# P\n\n## A\n\n{links}\n\n## C\n\nc\n\nend\n" and missing == []
    assert with_sections("<!-- README: A; Z -->", readme)[1] == ["Z"]


def test_pages_of_a_nested_nav_are_found():
    named_pages = loaded("hooks/links.py").named_pages
    assert named_pages(["index.md", {"A": "a.md"}, {"B": ["b/index.md", {"C": "b/c.md"}]}]) == {
        "index.md",
        "a.md",
        "b/index.md",
        "b/c.md",
    }
