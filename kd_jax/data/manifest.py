"""manifest.json of a prepared folder, written last: what was built, and from which config."""

import hashlib
import pathlib
from collections import Counter
from typing import Any

from kd_jax.data.rows import MANIFEST, STORE_FILES
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.text.utterances import Utterance
from kd_jax.runtime.copies import describe
from kd_jax.runtime.files import read_json, write_json
from kd_jax.types import UserError


def differences(old: Any, new: Any, key: str = "config") -> list[str]:
    """`key: old -> new` for each key in which two configs (plain values) differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        absent = "(absent)"
        return [
            line
            for name in sorted(old.keys() | new.keys())
            for line in differences(old.get(name, absent), new.get(name, absent), f"{key}.{name}")
        ]
    return [] if old == new else [f"{key}: {old!r} -> {new!r}"]


def read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of a store or a prepared folder, None where there is none; UserError for broken JSON."""
    try:
        return read_json(folder / MANIFEST)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{folder / MANIFEST}: broken JSON ({error}); remove the folder and run prepare again"
        ) from None


def write_manifest(
    folder: pathlib.Path,
    values: dict,
    utterances: list[Utterance],
    tokenizer: Tokenizer,
    manifests: list[dict[str, Any]],
) -> None:
    """Completes `folder`, which was built from `values` (config.<part> by part) and holds stores of these manifests."""
    partitions = Counter(f"{one.locale} {one.partition}" for one in utterances)
    content = hashlib.sha256()
    for locale in values["nlu"]["locales"]:
        content.update((folder / "utterances" / f"{locale}.jsonl").read_bytes())
    content.update(tokenizer.fingerprint.encode())
    removed: Counter = Counter()
    for manifest in manifests:
        content.update(f"{manifest['split']} {manifest['name']} {manifest['fingerprint']}".encode())
        if manifest["kind"] != "selected":  # its texts were counted at the store that it is a part of
            removed.update(manifest["removed"])
    whole = {
        "config": values,
        "fingerprint": content.hexdigest(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "utterances": dict(sorted(partitions.items())),
        "removed": dict(removed),
        "stores": manifests,
        "files": describe(folder, _file_names(folder, values, manifests)),
    }
    write_json(folder / MANIFEST, whole)


def _file_names(folder: pathlib.Path, values: dict, manifests: list[dict[str, Any]]) -> list[str]:
    """The names of all files but the manifest, in the order in which a training run asks for them."""
    names = [f"tokenizer/{file.name}" for file in sorted((folder / "tokenizer").iterdir())]
    for manifest in sorted(manifests, key=lambda manifest: manifest["split"] != "train"):
        store = f"rows/{manifest['split']}/{manifest['name']}"
        names += [f"{store}/{name}" for name in STORE_FILES]
    return names + [f"utterances/{locale}.jsonl" for locale in values["nlu"]["locales"]]
