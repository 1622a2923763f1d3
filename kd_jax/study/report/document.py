"""A report as sections of text, lists, tables and pictures, and its rendering as Markdown.

Text may hold **bold** and `code`, which both renderings understand; a cell of a table may hold two lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list without numbers."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """First `left` columns are names, the others numbers; `strong` are the indices of rows set off from the others."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    left: int = 1
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """figures/<name>.svg and figures/<name>.png; `alternative` says in words what is to be seen."""

    name: str
    caption: str
    alternative: str


Block = Text | Bullets | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; `anchor` is its name in links."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return "".join(character if character.isalnum() else "-" for character in self.title.lower())


@dataclass(frozen=True)
class Document:
    """A report: the first section is set off from the others in HTML."""

    title: str
    sections: Sequence[Section]


def markdown(document: Document) -> str:
    """The document in GitHub's Markdown."""
    parts = [f"# {document.title}"]
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts.extend(_block(block) for block in section.blocks)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Picture(name, caption, alternative):
            return f"![{alternative}](figures/{name}.svg)\n\n*{caption}*"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    rule = [":--" if column < table.left else "--:" for column in range(len(table.header))]
    rows = [
        [f"**{cell}**" if index in table.strong and column == 0 else cell for column, cell in enumerate(row)]
        for index, row in enumerate(table.rows)
    ]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in [table.header, rule, *rows]]
    return f"{table.caption}\n\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
