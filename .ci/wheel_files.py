"""Checks that a wheel holds the files of kd_jax/ and nothing else.

python .ci/wheel_files.py FILE.whl
"""

import pathlib
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main(wheel: str) -> int:
    """Prints every difference; returns the exit code."""
    kept = {".py", ".toml", ".html", ".typed"}
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "kd_jax").rglob("*") if file.suffix in kept}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    lines = [f"missing in the wheel: {name}" for name in sorted(files - packed)]
    lines += [f"does not belong in the wheel: {name}" for name in sorted(packed - files)]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        lines.append("missing in the wheel: LICENSE")
    print("\n".join(lines or [f"{pathlib.Path(wheel).name}: {len(packed)} files"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
