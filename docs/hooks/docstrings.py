"""Shows docstrings as plain text: characters that Markdown reads as HTML or emphasis are escaped."""

import re

import griffe

_CODE = re.compile(r"(`[^`]*`)")


def escaped(text: str) -> str:
    """The text with <, *, _ and [ made literal outside `code` and indented blocks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("    "):
            parts = _CODE.split(line)
            parts[::2] = [re.sub(r"([*_\[])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
            line = "".join(parts)
        lines.append(line)
    return "\n".join(lines)


class PlainDocstrings(griffe.Extension):
    """Escapes every docstring that griffe reads."""

    def on_object(self, *, obj, **rest):
        """Called by griffe for each module, class, function and attribute."""
        del rest
        if obj.docstring:
            obj.docstring.value = escaped(obj.docstring.value)
