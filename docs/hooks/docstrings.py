"""Shows docstrings as plain text: escapes what Markdown reads as HTML or emphasis, and lists the keys of settings."""

import re

import griffe

_CODE = re.compile(r"(`[^`]*`)")
_FIELD = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): ")


def fields_as_list(text: str) -> str:
    """The text with each line `name: what it is`, and the indented lines below it, as one item of a list."""
    lines = []
    for line in text.splitlines():
        if field := _FIELD.match(line):
            lines.append(f"- `{field.group(1)}`: {line[field.end() :]}")
        elif line.startswith("    ") and lines and lines[-1].startswith("- "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


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
    """Prepares every docstring that griffe reads."""

    def on_object(self, *, obj, **rest):
        """Called by griffe for each module, class, function and attribute."""
        del rest
        if obj.docstring:
            settings = obj.is_class and obj.path.startswith("kd_jax.config.")
            text = fields_as_list(obj.docstring.value) if settings else obj.docstring.value
            obj.docstring.value = escaped(text)
