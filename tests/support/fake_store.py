"""gs:// and s3:// of this process on a folder: a store for fsspec, and what tensorstore speaks to gs:// with.

Like a store and unlike a folder: a file's folders are not made and empty ones are not seen, and a file takes its name
when it is closed. Orbax writes a checkpoint's arrays on gs:// past fsspec, with tensorstore, which
TENSORSTORE_GCS_HTTP_URL leads to `serving`, the few requests of the store's JSON interface that it makes.
"""

import contextlib
import http.server
import io
import json
import os
import pathlib
import shutil
import sys
import threading
import types
import urllib.parse
import uuid
from collections.abc import Callable, Iterator

import fsspec
from etils.epath import backend


def install(root: pathlib.Path, faults: Callable[[], None] = lambda: None) -> list[str]:
    """From now on, buckets are folders of `root`/buckets. Returns a list that collects each name opened for reading.

    faults: called before each operation, which it may delay, or fail by raising.
    """
    read: list[str] = []
    (root / "uploads").mkdir(parents=True, exist_ok=True)

    class Store(fsspec.AbstractFileSystem):
        """The folder, reached by gs://bucket/name and s3://bucket/name."""

        protocol = ("gs", "gcs", "s3")
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return os.fspath(path).split("://", 1)[-1].strip("/")

        def _place(self, path) -> pathlib.Path:
            return root / "buckets" / self._strip_protocol(path)

        def info(self, path, **options):
            faults()
            place, name = self._place(path), self._strip_protocol(path)
            if place.is_file():
                return {"name": name, "size": place.stat().st_size, "type": "file"}
            if any(file.is_file() for file in place.rglob("*")):
                return {"name": name, "size": 0, "type": "directory"}
            raise FileNotFoundError(path)

        def exists(self, path, **options):
            try:  # as in s3fs and gcsfs; fsspec's own treats every error as "no"
                self.info(path)
                return True
            except FileNotFoundError:
                return False

        def ls(self, path, detail=True, **options):
            found = [self.info(path)]
            if found[0]["type"] == "directory":
                found = []
                for inside in sorted(self._place(path).iterdir()):
                    with contextlib.suppress(FileNotFoundError):  # an empty folder
                        found.append(self.info(f"{self._strip_protocol(path)}/{inside.name}"))
            return found if detail else [entry["name"] for entry in found]

        def _open(self, path, mode="rb", **options):
            faults()
            if mode == "rb":
                read.append(self._strip_protocol(path))
                return open(self._place(path), "rb")
            return _Upload(root / "uploads" / uuid.uuid4().hex, self._place(path), faults)

        def _rm(self, path):
            faults()
            self._place(path).unlink()

        def rm(self, path, recursive=False, maxdepth=None):
            faults()
            place = self._place(path)
            if recursive and not place.is_file():
                self.info(path)
                shutil.rmtree(place)
            else:
                place.unlink()

        def mkdir(self, path, create_parents=True, **options):
            pass

        def makedirs(self, path, exist_ok=False):
            pass

    for name in Store.protocol:
        fsspec.register_implementation(name, Store, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    return read


class _Upload(io.FileIO):
    """A file that takes its name when it is closed."""

    def __init__(self, hidden: pathlib.Path, target: pathlib.Path, faults: Callable[[], None]):
        super().__init__(hidden, "wb")
        self._hidden, self._target, self._faults = hidden, target, faults

    def close(self):
        if not self.closed:
            super().close()
            self._faults()
            self._target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self._hidden, self._target)


@contextlib.contextmanager
def serving(root: pathlib.Path, refuses: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Answers tensorstore's requests for gs:// from the folder of `install`; orbax's own client has a stand-in.

    refuses(): called for each request; True answers it with 503, which asks for a retry.
    """
    buckets, lock, generations = root / "buckets", threading.Lock(), {}

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *arguments):
            pass

        def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _asked(self) -> tuple[pathlib.Path, str, dict[str, str]]:
            """(bucket, object name, query) of a request."""
            url = urllib.parse.urlsplit(self.path)
            query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
            bucket, _, rest = url.path.split("/b/", 1)[1].partition("/o")
            return buckets / bucket, urllib.parse.unquote(rest.strip("/")) or query.get("name", ""), query

        def _generation(self, file: pathlib.Path) -> str:
            return str(generations.get(str(file), 1)) if file.is_file() else "0"

        def _about(self, bucket: pathlib.Path, name: str) -> dict[str, str]:
            file = bucket / name
            return {"name": name, "generation": self._generation(file), "size": str(file.stat().st_size)}

        def parse_request(self):
            parsed = super().parse_request()
            if parsed and refuses():
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self._answer(503)
                return False
            return parsed

        def do_GET(self):
            bucket, name, query = self._asked()
            with lock:
                if not name:
                    names = sorted(file.relative_to(bucket).as_posix() for file in bucket.rglob("*") if file.is_file())
                    names = [name for name in names if name.startswith(query.get("prefix", ""))]
                    names = [name for name in names if name >= query.get("startOffset", "")]
                    names = [name for name in names if "endOffset" not in query or name < query["endOffset"]]
                    found = {"items": [self._about(bucket, name) for name in names]}
                    self._answer(200, json.dumps(found).encode(), content_type="application/json")
                elif not (bucket / name).is_file():
                    self._answer(404)
                elif query.get("ifGenerationNotMatch") == self._generation(bucket / name):
                    self._answer(304)
                else:
                    data, about = (bucket / name).read_bytes(), self._about(bucket, name)
                    headers = {"x_goog_generation": about["generation"], "x_goog_stored_content_length": about["size"]}
                    wanted = self.headers.get("range", "").removeprefix("bytes=")
                    if not wanted:
                        self._answer(200, data, **headers)
                        return
                    first, _, last = wanted.partition("-")
                    start = int(first) if first else len(data) - int(last)
                    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
                    headers["content_range"] = f"bytes {start}-{end}/{len(data)}"
                    self._answer(206, data[start : end + 1], **headers)

        def do_POST(self):
            bucket, name, query = self._asked()
            data = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                file = bucket / name
                if query.get("ifGenerationMatch", self._generation(file)) != self._generation(file):
                    self._answer(412)
                    return
                generations[str(file)] = int(self._generation(file)) + 1
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                self._answer(200, json.dumps(self._about(bucket, name)).encode(), content_type="application/json")

        def do_DELETE(self):
            bucket, name, _ = self._asked()
            with lock:
                found = (bucket / name).is_file()
                (bucket / name).unlink(missing_ok=True)
                self._answer(204 if found else 404)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{server.server_port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    client = types.ModuleType("google.cloud.storage")
    client.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())  # type: ignore
    package = types.ModuleType("google.cloud")
    package.storage = client  # type: ignore
    modules = {"google.cloud": package, "google.cloud.storage": client}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    sys.modules.update(modules)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for name in modules:
            sys.modules.pop(name, None)
