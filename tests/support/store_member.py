"""A process of its own that fetches everything of a remote folder: python store_member.py STORE LOCAL NAME [KILL].

Reading takes its time. It makes LOCAL/ready-<pid>, waits for LOCAL/go, and prints the names that it read from the
store. KILL: it kills itself at the end of the file of that name, before it is in its place.
"""

import json
import os
import pathlib
import signal
import sys
import time

from kd_jax.runtime import copies
from kd_jax.runtime.files import read_json
from kd_jax.runtime.paths import as_path
from tests.support import fake_store


def slow(chunks):
    """The chunks, each a moment later."""
    for chunk in chunks:
        time.sleep(0.02)
        yield chunk


if __name__ == "__main__":
    store, local, name, *kill = sys.argv[1:]
    read = fake_store.install(pathlib.Path(store))
    copies.keep_copies_in(local)
    copies._CHUNK = 16
    remote = as_path(name)
    manifest = read_json(remote / "manifest.json")
    read.clear()
    real = copies.os.fsync
    if kill:

        def die(descriptor):
            if kill[0] in os.readlink(f"/proc/self/fd/{descriptor}"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        copies.os.fsync = die
    take, copies._chunks = copies._chunks, lambda source: slow(take(source))
    (pathlib.Path(local) / f"ready-{os.getpid()}").touch()
    while not (pathlib.Path(local) / "go").exists():
        time.sleep(0.01)
    copies.LocalCopy(remote, manifest).part()
    print(json.dumps(read))
