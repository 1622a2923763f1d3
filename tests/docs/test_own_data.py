"""The commands of docs/own-data.md run as written (the study at smoke size) and print what the page shows."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from kd_jax.data.text.utterances import read_massive

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "own-data.md"
CONFIG = "docs/examples/own_data/config.py"
MARK = "--- block"


def blocks():
    """(language, content) of the fenced blocks of the page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def script():
    """The page's commands as one script, since they share variables; the output of each block begins with MARK."""
    lines = ["set -eu -o pipefail"]
    for language, content in blocks():
        if language == "bash":
            content = content.replace(".venv/bin/python", sys.executable)
            # The check is fast at full size, and the page shows its output.
            content = re.sub(rf"main\.(study|export) --config={CONFIG}", rf"main.\1 --config={CONFIG}:smoke", content)
            lines += [f"echo '{MARK}'", content]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder where the commands ran, the output of each block)."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("configs", "docs", "kd_jax"):
        (folder / name).symlink_to(ROOT / name)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        ["bash", "-c", script()], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout.split(f"{MARK}\n")[1:]


def test_the_page_has_the_commands_of_every_step():
    commands = "".join(content for language, content in blocks() if language == "bash")
    for wanted in ("main.prepare", "--check", "main.study", "main.predict", "main.export"):
        assert wanted in commands
    assert script().count(":smoke") == 2


def test_the_format_that_the_page_shows_is_read(tmp_path):
    (record,) = [json.loads(content) for language, content in blocks() if language == "json"]
    (tmp_path / "en-US.jsonl").write_text(json.dumps(record) + "\n")
    (utterance,) = read_massive(tmp_path, ["en-US"])
    assert utterance.tags == ("O", "B-item", "I-item", "O", "O", "O")


@pytest.mark.long
@pytest.mark.slow
def test_commands_print_what_the_page_shows(finished):
    _, outputs = finished
    kinds = [language for language, _ in blocks() if language in ("bash", "text")]
    contents = [content for language, content in blocks() if language in ("bash", "text")]
    assert kinds.count("bash") == len(outputs)
    shown = 0
    for index, kind in enumerate(kinds):
        if kind == "text":
            printed = iter(outputs[kinds[:index].count("bash") - 1].splitlines())
            for line in contents[index].splitlines():
                if line not in ("", "..."):
                    assert any(other == line for other in printed), f"the page shows {line!r}"  # in this order
                    shown += 1
    assert shown > 10


@pytest.mark.long
@pytest.mark.slow
def test_commands_leave_a_report_answers_and_a_model(finished):
    folder, outputs = finished
    assert (folder / "runs" / "own_study" / "report.html").is_file()
    asked = next(output for output in outputs if "put olive oil on my list" in output)
    assert "domain: " in asked and "intent: " in asked
    answers = [json.loads(line) for line in asked.splitlines() if line.startswith("{")]
    assert [one["text"] for one in answers] == ["stop the bread timer", "wir brauchen drei packungen mehl"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir(folder / "runs" / "own_export"))
