"""A worker of a study whose stages are stand-ins: toy_worker.py, see kd_jax/study/workers.py.

TOY in the environment maps the command of a stage to what it does: "fail", "crash", "die", or "wait" until it is asked
to stop. Each stage records its process in started/<folder>, and in its DONE the stages that were finished when it
began.
"""

import json
import os
import pathlib
import signal
import sys
import time

from kd_jax.main import study
from kd_jax.runtime.preemption import interruptible
from kd_jax.study.run import Study, switched
from kd_jax.study.workers import serve
from kd_jax.types import UserError


def stage(name: str, values: dict, folder: pathlib.Path) -> None:
    begun = folder.parent.parent / "started"
    begun.mkdir(exist_ok=True)
    finished = sorted(path.parent.name for path in folder.parent.glob("*/DONE"))
    (begun / folder.name).write_text(str(os.getpid()))
    action = json.loads(os.environ.get("TOY", "{}")).get(name)
    if action == "fail":
        raise UserError(f"config.{name}: it is wrong")
    if action == "crash":
        raise ZeroDivisionError("a mistake of ours")
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "wait":
        for _ in interruptible(range(1000), name):
            time.sleep(0.05)
    print(f"details of {name}")
    time.sleep(0.05)
    folder.mkdir(parents=True)
    for file, content in (("DONE", {"before": finished}), ("heldout.json", []), ("dev.json", {"score": 0.5})):
        (folder / file).write_text(json.dumps(content))


def opened(about: dict) -> Study:
    return Study(about["config"], pathlib.Path(about["workdir"]), stage, study.KEYS)


if __name__ == "__main__":
    sys.exit(serve(opened, switched))
