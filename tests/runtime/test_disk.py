import errno
import os

import pytest

from kd_jax.runtime.disk import full_disk_is_user_error, write_atomically, write_json
from kd_jax.types import UserError


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("INTERNAL: Error writing local file: no space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence_with_the_place(error):
    with pytest.raises(UserError, match=r"^/runs/a: the disk is full .*start the same command again"):  # noqa: SIM117
        with full_disk_is_user_error("/runs/a"):
            raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("shape"), UserError("mine")])
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as caught, full_disk_is_user_error("/runs/a"):
        raise error
    assert caught.value is error


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "dev.json"
    write_json(path, {"score": 0.5, "name": "größe"})
    assert path.read_text(encoding="utf-8") == '{\n  "score": 0.5,\n  "name": "größe"\n}\n'

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8").startswith("{")
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_refused_since_it_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []
