"""From a block of the config to a frozen dataclass that states and checks what the code below the commands reads."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from kd_jax.types import UserError

Settings = TypeVar("Settings")


class Invalid(ValueError):
    """A setting that makes no sense; `read` turns it into a UserError that names the config key."""

    def __init__(self, field: str, problem: str, remedy: str):
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy


def check(condition: bool, field: str, problem: str, remedy: str) -> None:
    """Raises Invalid unless the condition holds; for `__post_init__` of the dataclasses in this package."""
    if not condition:
        raise Invalid(field, problem, remedy)


def one_of(value: str, choices: Iterable[str], field: str) -> None:
    """Raises Invalid unless the value is one of the choices."""
    check(value in (known := tuple(choices)), field, f"{value!r} is unknown", f"use {', '.join(known)}")


def plain_names(names: Iterable[str], field: str) -> None:
    """Raises Invalid unless all names can be part of file names."""
    for name in names:
        plain = re.fullmatch(r"[^\W_][\w.-]*", name) is not None
        remedy = "use letters, digits, '-', '_' and '.'"
        if all(part.strip() for part in name.split(",")) and "," in name:
            several = ",".join(f"'{part.strip()}'" for part in name.split(","))
            remedy = f'several are written as a tuple: "({several})"'
        check(plain, field, f"{name!r} cannot be part of a file name", remedy)


def read(kind: type[Settings], block: ConfigDict | Mapping[str, Any], key: str) -> Settings:
    """config.<key> as a frozen dataclass; raises UserError, naming config.<key>.<field>, for what makes no sense."""
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        value, name = block[field.name], f"{key}.{field.name}" if key else field.name
        if dataclasses.is_dataclass(field.type):
            value = read(field.type, value, name)  # type: ignore[arg-type]
        elif isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        elif isinstance(value, ConfigDict):  # names of the user's own choice, such as transfer sets
            value = value.to_dict()
        check_numbers(value, f"config.{name}")
        if field.type is float and not isinstance(value, tuple):
            value = float(value)
        values[field.name] = value
    try:
        return kind(**values)
    except Invalid as error:
        name = ".".join(part for part in ("config", key, error.field) if part)
        raise UserError(f"{name}: {error.problem}; {error.remedy}") from None


def check_numbers(value: Any, key: str) -> None:
    """Raises UserError, naming the key, for NaN, infinity and integers of more than 64 bits in a config's values."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_numbers(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_numbers(item, key)
    elif isinstance(value, int | float):
        # jax seeds random numbers with 32 bits.
        most = 2**31 if key == "config.seed" else 2**63
        good = math.isfinite(value) if isinstance(value, float) else -most <= value < most
        if not good:
            shown = str(value) if isinstance(value, float) else f"{value:.3e}" if abs(value) < 1e300 else "it"
            raise UserError(f"{key}: {shown} is not finite or too large; give another number")


def block(kind: Any, /, **changes: Any) -> ConfigDict:
    """The defaults of a dataclass, with changes, as a block of the config; the inverse of `read`."""
    values = {}
    for field in dataclasses.fields(kind):  # without an instance, which would check defaults that the user must change
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        values[field.name] = _plain(changes.pop(field.name, value))
    if changes:
        raise KeyError(f"{kind.__name__} has no field {next(iter(changes))!r}")
    return ConfigDict(values)


def _plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
