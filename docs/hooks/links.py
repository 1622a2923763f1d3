"""Hooks of the documentation's site: sections of README.md, links that leave docs/, and pages that mkdocs.yml does not
name.
"""

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

    `page` is its path below docs/. On the site, a link to a file outside docs/ leads to the repository where its
    address is known (repo_url of mkdocs.yml), and is the link's bare text elsewhere; links inside docs/ stay.
    """
    missing = []

    def replaced(link: re.Match) -> str:
        text, target, _ = link.groups()
        place = os.path.normpath(os.path.join("docs", os.path.dirname(page), target))
        if place.startswith(f"docs{os.sep}"):
            return link.group()
        if place.startswith("..") or not (ROOT / place).exists():
            missing.append(target)
        return f"[{text}]({repository.rstrip('/')}/blob/main/{place})" if repository else text

    return _LINK.sub(replaced, markdown), missing


def with_sections(markdown: str, readme: str) -> tuple[str, list[str]]:
    """(a page right below docs/ with README's sections in place of `<!-- README: heading; heading -->`, headings that
    README lacks).
    """
    missing = []

    def section(heading: str) -> str:
        found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", readme, flags=re.MULTILINE | re.DOTALL)
        if found is None:
            missing.append(heading)
            return ""
        # README lies one folder above: its docs/x.md is x.md here, and its configs/x.py is ../configs/x.py.
        text = re.sub(r"\]\((?!\w+:|#)", "](../", found.group())
        return text.replace("](../docs/", "](").strip()

    def sections(mark: re.Match) -> str:
        return "\n\n".join(section(heading.strip()) for heading in mark.group(1).split(";"))

    return _SECTIONS.sub(sections, markdown), missing


def on_page_markdown(markdown, page, config, files):
    """Fills in README's sections and rewrites links out of docs/; what is not there is a warning."""
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
    """Puts the pages that mkdocs.yml does not name at the end, so that a new page is never out of reach."""
    named = named_pages(config.nav)
    rest = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    if rest:
        config.nav.append({"More": rest})
    return files
