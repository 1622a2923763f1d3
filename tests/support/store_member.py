"""A process of its own that fetches everything of a remote folder: python store_member.py STORE LOCAL NAME [KILL].

Each fetch takes its time. It makes LOCAL/ready-<pid>, waits for LOCAL/go, and prints the names that it read from the
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

if __name__ == "__main__":
    store, local, name, *kill = sys.argv[1:]
    read = fake_store.install(pathlib.Path(store))
    copies.keep_copies_in(local)
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
    checksum = copies.sha256_of

    def slow(path):
        time.sleep(0.2)
        return checksum(path)

    copies.sha256_of = slow
    (pathlib.Path(local) / f"ready-{os.getpid()}").touch()
    while not (pathlib.Path(local) / "go").exists():
        time.sleep(0.01)
    copies.LocalCopy(remote, manifest).part()
    print(json.dumps(read))
