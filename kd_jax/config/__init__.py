"""Configs as plain values: compared, fingerprinted, and divided into what decides results and what does not.

`base.py` has all keys with their defaults; `data`, `training`, `execution` and `commands` document and check them.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config.settings import check_numbers
from kd_jax.types import UserError


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, the way config.json holds it."""
    return json.loads(json.dumps(config.to_dict()))


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`; lists become tuples, as configs write them."""

    def convert(value):
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list):
            return tuple(convert(item) for item in value)
        return value

    return ConfigDict(convert(values))


def fingerprint(values: Any, length: int = 12) -> str:
    """Hex digest of a JSON value; equal values give equal digests whatever the order of their keys."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """One line for each key in which two configs (plain values) differ: `key: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            place = f"{prefix}.{key}" if prefix else key
            if key not in old:
                lines.append(f"{place}: (absent) -> {new[key]!r}")
            elif key not in new:
                lines.append(f"{place}: {old[key]!r} -> (absent)")
            else:
                lines.extend(differences(old[key], new[key], place))
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


# Top-level keys that every command reads and that change only how a run is executed and watched.
EXECUTION_KEYS = (
    *("mesh", "sharding", "storage", "attention", "logits", "progress", "tensorboard", "wandb"),
    *("watchdog_seconds", "watchdog_exit", "cache_part", "cache_parts"),
)

# Keys, at any depth, that a resume may change.
MAY_CHANGE = frozenset(
    {*EXECUTION_KEYS, "accumulation", "log_every", "checkpoint_every", "keep_checkpoints", "skip_non_finite"}
)


def identity(values: Any) -> Any:
    """The part of a config (plain values) that a resumed run must share with the run it resumes."""
    if isinstance(values, dict):
        return {key: identity(value) for key, value in values.items() if key not in MAY_CHANGE}
    return values


def resolved(config: ConfigDict, keys: Iterable[str]) -> dict[str, Any]:
    """The part of a config that a command reads, as plain values: what its config.json holds."""
    values = to_dict(config)
    found = {key: values[key] for key in (*keys, *EXECUTION_KEYS)}
    check_numbers(found, "config")
    return found


def require(condition: bool, key: str, problem: str, remedy: str) -> None:
    """Raises a UserError that names the config key, what is wrong and how to fix it."""
    if not condition:
        raise UserError(f"config.{key}: {problem}; {remedy}")
