"""A model in the layout of the hub's cache, as a download leaves it."""

import os
import pathlib
import shutil

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(cache: pathlib.Path, name: str, folder: pathlib.Path) -> dict[str, str]:
    """Lays the files of a folder under the name in a cache; the environment of a process that finds them offline."""
    place = cache / "hub" / f"models--{name.replace('/', '--')}"
    blobs, snapshot = place / "blobs", place / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(pathlib.Path("..", "..", "blobs", f"{number:040x}"))
    return {**os.environ, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}
