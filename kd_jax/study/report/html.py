"""A report as one HTML page that needs no network: our own CSS, pictures embedded."""

import base64
import html
import pathlib
import re

from kd_jax.study.report.document import Block, Bullets, Document, Picture, Table, Text

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --shade: #f5f7fa; --mark: #0b5394; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid
var(--line); }
p, li { max-width: 50rem; }
a { color: var(--mark); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--shade); padding: .05em
.3em;
  border-radius: 3px; overflow-wrap: anywhere; }
nav { font-size: .92rem; color: var(--soft); margin: 1.2rem 0 1.5rem; }
nav ol { margin: .3rem 0 0; padding-left: 1.4rem; columns: 2; }
section.verdict { background: var(--shade); border-left: 4px solid var(--mark); padding: .4rem 1rem .6rem; }
section.verdict h2 { border: 0; margin: .3rem 0; padding: 0; }
.scroll { overflow-x: auto; margin: 1.1rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
.caption, figcaption { color: var(--soft); font-size: .9rem; max-width: 50rem; }
.caption { margin: 1.4rem 0 -.6rem; }
th, td { padding: .32rem .55rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th.name, td.name { text-align: left; white-space: normal; min-width: 9rem; }
td.wide { min-width: 17rem; }
thead th { white-space: normal; max-width: 10rem; border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tr.strong td { background: var(--shade); font-weight: 600; }
td small { display: block; color: var(--soft); font-weight: 400; font-size: .92em; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
tr.strong td:first-child { background: var(--shade); }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; max-width: 50rem; height: auto; }
figcaption { margin-top: .4rem; }
@media (max-width: 40rem) {
  nav ol { columns: 1; }
  figure .scroll img { width: auto; min-width: 36rem; }
  th.name, td.name { min-width: 7.5rem; }
  td.wide { min-width: 13rem; }
}
@media print { body { max-width: none; } .scroll { overflow: visible; } figure, tr { break-inside: avoid; } }
"""


def page(document: Document, figures: pathlib.Path) -> str:
    """The document as HTML; `figures` is the folder with <name>.svg of each picture."""
    sections = []
    for number, section in enumerate(document.sections):
        kind = ' class="verdict"' if number == 0 else ""
        blocks = "\n".join(_block(block, figures) for block in section.blocks)
        heading = f'<h2 id="{section.anchor}">{html.escape(section.title)}</h2>'
        sections.append(f"<section{kind}>\n{heading}\n{blocks}\n</section>")
    links = "".join(
        f'<li><a href="#{section.anchor}">{html.escape(section.title)}</a></li>' for section in document.sections[1:]
    )
    title = html.escape(document.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"{sections[0]}\n<nav>In this report<ol>{links}</ol></nav>\n" + "\n".join(sections[1:]) + "\n</body>\n</html>\n"
    )


def inline(text: str) -> str:
    """Escaped text with **bold** and `code` as elements; further lines of a cell become small print."""
    first, *more = text.split("\n")
    shown = _marked(first)
    return shown + "".join(f"<small>{_marked(line)}</small>" for line in more)


def _marked(text: str) -> str:
    escaped = html.escape(text).replace(" %", "\u00a0%")
    escaped = re.sub(r"\[[^\]]*\]", lambda interval: interval.group().replace(" ", "\u00a0"), escaped)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)


def _block(block: Block, figures: pathlib.Path) -> str:
    match block:
        case Text(text):
            return f"<p>{inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"
        case Picture(name, caption, alternative):
            data = base64.b64encode((figures / f"{name}.svg").read_bytes()).decode()
            image = f'<img alt="{html.escape(alternative)}" src="data:image/svg+xml;base64,{data}">'
            return f'<figure><div class="scroll">{image}</div><figcaption>{inline(caption)}</figcaption></figure>'
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    def cell(tag: str, column: int, text: str) -> str:
        kinds = []
        if column < table.left:
            kinds.append("name")
        if tag == "td" and len(text.split("\n")[0]) > 45:
            kinds.append("wide")
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{kind}>{inline(text)}</{tag}>"

    head = "".join(cell("th", column, name) for column, name in enumerate(table.header))
    body = "".join(
        ('<tr class="strong">' if index in table.strong else "<tr>")
        + "".join(cell("td", column, text) for column, text in enumerate(row))
        + "</tr>\n"
        for index, row in enumerate(table.rows)
    )
    return (
        f'<p class="caption">{inline(table.caption)}</p>\n<div class="scroll"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )
