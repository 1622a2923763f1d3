import errno
import json

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from kd_jax.runtime.files import read_json_lines
from kd_jax.trainer.metrics import MetricsWriter, Window
from kd_jax.types import UserError


def test_a_window_divides_once():
    window = Window()
    window.add({"loss": (jnp.float32(6.0), jnp.float32(2.0)), "kl": (1.0, 0.0)})
    window.add({"loss": (1.0, 5.0), "late": (3.0, 4.0)})
    assert window.take() == {"loss": 1.0, "kl": None, "late": 0.75}  # a mean of means would give loss 1.6
    assert window.take() == {}


def test_a_window_goes_on_from_its_totals_exactly():
    straight, first = Window(), Window()
    for window in (straight, first):
        window.add({"loss": (0.1, 3.0)})
        window.add({"loss": (0.2, 3.0)})
    resumed = Window(json.loads(json.dumps(first.totals())))
    straight.add({"loss": (0.3, 1.0)})
    resumed.add({"loss": (0.3, 1.0)})
    assert straight.take() == resumed.take()


def test_rows_are_json_with_null_for_the_undefined(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.start(0)
    writer.write(10, {"loss": 0.1, "kl": None, "bad": float("nan")})
    assert read_json_lines(tmp_path / "metrics.jsonl", growing=True) == [
        {"step": 10, "loss": 0.1, "kl": None, "bad": None}
    ]
    writer.close()


def test_a_resume_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 5, "loss": 0.5}\n{"step": 10, "loss": 0.25}\n{"step": 15, "loss": 0.125}\n{"step": 20, "lo'
    )
    assert [row["step"] for row in read_json_lines(path, growing=True)] == [5, 10, 15]
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.start(10)
    writer.write(15, {"loss": 1.0})
    writer.close()
    assert path.read_text() == '{"step": 5, "loss": 0.5}\n{"step": 10, "loss": 0.25}\n{"step": 15, "loss": 1.0}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resume_keeps_as_many_rows_as_the_checkpoint_knew(tmp_path):
    for rows, kept in ((None, 2), (1, 1), (5, 1)):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        writer.start(0 if rows is None else 5, rows)
        if rows is None:
            writer.write(5, {"loss": 0.5})
            writer.write(5, {"dev/accuracy": 0.25})
        assert writer.rows == kept == len(read_json_lines(tmp_path / "metrics.jsonl", growing=True))
        writer.close()


def events(folder):
    """The events of a TensorBoard folder: records of length (8 bytes), checksum (4), data, checksum (4)."""
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path):
    for start, loss in ((0, 0.5), (3, 0.25)):
        writer = MetricsWriter(tmp_path, tensorboard=True)
        writer.start(start)
        writer.write(4, {"loss": loss, "kl": None})
        writer.close()
    found = list(events(tmp_path / "tensorboard"))
    scalars = [(event.step, one.tag, one.simple_value) for event in found for one in event.summary.value]
    assert sorted(scalars) == [(4, "loss", 0.25), (4, "loss", 0.5)]
    purges = [event.step for event in found if event.session_log.status == event.session_log.START]
    assert 4 in purges


def test_a_full_disk_is_the_users_to_mend(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.start(0)

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(UserError, match=r"metrics\.jsonl: the disk is full"):
        writer.write(1, {})


def test_write_before_start_is_a_bug(tmp_path):
    with pytest.raises(RuntimeError, match="start comes before write"):
        MetricsWriter(tmp_path, tensorboard=False).write(1, {})


def test_a_start_says_how_many_steps_are_done_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (5, 10, 15)))
    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert writer.start(7) == 8
    assert writer.start(7) == 0
    assert writer.start(9) == 0
    writer.close()
    assert MetricsWriter(tmp_path / "new", tensorboard=False).start(0) == 0
