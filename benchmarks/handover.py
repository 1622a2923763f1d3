"""What the parent hands a worker on disk, written and read without jax or PyTorch."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Saves arrays by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named: dict[str, Any] = dict(arrays)
    np.savez(path, **named)


def write_batches(path: pathlib.Path, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Saves batches in order."""
    write_arrays(path, {f"{index}/{name}": values for index, one in enumerate(batches) for name, values in one.items()})


def read_batches(path: str | pathlib.Path) -> list[dict[str, np.ndarray]]:
    """The batches that `write_batches` saved, in order."""
    with np.load(path, allow_pickle=False) as file:
        batches: list[dict[str, np.ndarray]] = []
        for key in file.files:
            index, name = key.split("/")
            while len(batches) <= int(index):
                batches.append({})
            batches[int(index)][name] = np.ascontiguousarray(file[key])
    return batches


def read_arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of one file by name."""
    with np.load(path, allow_pickle=False) as file:
        return {name: np.ascontiguousarray(file[name]) for name in file.files}


def read_tree(path: str | pathlib.Path) -> dict[str, Any]:
    """Parameters that `workloads.write_weights` saved by path, as the nested dicts that models take."""
    tree: dict[str, Any] = {}
    for name, values in read_arrays(path).items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = values
    return tree


def read_spec(path: str | pathlib.Path) -> dict[str, Any]:
    """A worker's orders, as `workers.Worker` wrote them."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
