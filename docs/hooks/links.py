"""Hooks of the docs site: sections of README.md, links out of docs/, and pages missing from the nav of mkdocs.yml."""

import logging
import os.path
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LOG = logging.getLogger("mkdocs.hooks.links")  # a warning here fails `mkdocs build --strict`
_SECTIONS = re.compile(r"^<!-- README: (.+) -->$", flags=re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")


def outward_links(markdown: str, page: str, repository: str) -> tuple[str, list[str]]:
    """(the page with links to the repository's other files, targets that do not exist).

    `page` is its path below docs/. A link to a file outside docs/ points to the repository if repo_url of mkdocs.yml is
    set, and otherwise becomes its bare text. Links inside docs/ do not change.
    """
    missing = []

    def replaced(link: re.Match) -> str:
        text, target, _ = link.groups()
        path = os.path.normpath(os.path.join("docs", os.path.dirname(page), target))
        if path.startswith(f"docs{os.sep}"):
            return link.group()
        if path.startswith("..") or not (ROOT / path).exists():
            missing.append(target)
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})" if repository else text

    return _LINK.sub(replaced, markdown), missing


def with_sections(markdown: str, readme: str) -> tuple[str, list[str]]:
    """(the page with README's sections in place of `<!-- README: heading; heading -->`, headings that README lacks).

    The page must be directly below docs/, since links are rewritten for that folder.
    """
    missing = []

    def section(heading: str) -> str:
        found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", readme, flags=re.MULTILINE | re.DOTALL)
        if found is None:
            missing.append(heading)
            return ""
        # README is one folder up: its docs/x.md is x.md here, and its configs/x.py is ../configs/x.py.
        text = re.sub(r"\]\((?!\w+:|#)", "](../", found.group())
        return text.replace("](../docs/", "](").strip()

    def sections(mark: re.Match) -> str:
        return "\n\n".join(section(heading.strip()) for heading in mark.group(1).split(";"))

    return _SECTIONS.sub(sections, markdown), missing


def on_page_markdown(markdown, page, config, files):
    """Inserts README's sections and rewrites links out of docs/; a missing section or target is a warning."""
    del files
    name = page.file.src_uri
    text, absent = with_sections(markdown, (ROOT / "README.md").read_text(encoding="utf-8"))
    text, missing = outward_links(text, name, config.repo_url or "")
    for heading in absent:
        LOG.warning("%s: README.md has no section '## %s'", name, heading)
    for target in missing:
        LOG.warning("%s: links to %s, which does not exist", name, target)
    return text


def named_pages(nav) -> set[str]:
    """The pages in a nav of mkdocs.yml."""
    if isinstance(nav, str):
        return {nav}
    values = nav.values() if isinstance(nav, dict) else nav
    return set().union(*map(named_pages, values))


def on_files(files, config):
    """Appends the pages that the nav does not name, so that a new page can always be reached."""
    named = named_pages(config.nav)
    rest = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    if rest:
        config.nav.append({"More": rest})
    return files
