"""Tables as text: Markdown for files, aligned columns for a terminal."""

import re
from collections.abc import Sequence

# Characters with a meaning in Markdown inside a line, but only where they have it, so that test_unseen and [-1, 2] stay
# readable: an underscore at the end of a word, a bracket that a link could follow. `markdown_table` escapes pipes.
_SPECIAL = re.compile(r"[\\`*<>&~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])")


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: for names that come from users."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in GitHub's Markdown, the first `left` columns aligned left and the others right.

    Cells are Markdown; a line break in one becomes <br>.
    """
    rule = [":--" if column < left else "--:" for column in range(len(header))]
    cells = ([cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def aligned_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, *, rule: bool = False, width: int | None = None
) -> str:
    """A table in columns two spaces apart, the first `left` aligned left and the others right.

    rule: a line of dashes under the header. width: most characters in a line, to which the first column is cut.
    """
    lines = [list(header), *(list(row) for row in rows)]
    sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gaps = 2 * (len(sizes) - 1)
    if width is not None:
        sizes[0] = min(sizes[0], max(8, width - sum(sizes[1:]) - gaps))
    text = []
    for first, *others in lines:
        cells = [first if len(first) <= sizes[0] else first[: sizes[0] - 1] + "…", *others]
        padded = (
            cell.ljust(size) if column < left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(cells, sizes))
        )
        text.append("  ".join(padded).rstrip())
    if rule:
        text.insert(1, "-" * (sum(sizes) + gaps))
    return "\n".join(text)
