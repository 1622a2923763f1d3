"""Hooks of the documentation's site: links that leave docs/, and pages that mkdocs.yml does not name."""

import logging
import os.path
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LOG = logging.getLogger("mkdocs.hooks.links")  # a warning here fails `mkdocs build --strict`
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


def on_page_markdown(markdown, page, config, files):
    """Rewrites a page's links out of docs/; one that leads nowhere is a warning."""
    del files
    text, missing = outward_links(markdown, page.file.src_uri, config.repo_url or "")
    for target in missing:
        LOG.warning("%s: links to %s, which does not exist", page.file.src_uri, target)
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
