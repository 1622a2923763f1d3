"""The report's page in a browser, if one is installed: nothing overflows a narrow or a wide window."""

import glob
import html
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from kd_jax.study.report.report import write_report
from tests.support.report_inputs import synthetic_inputs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLAYWRIGHT = "~/.cache/ms-playwright/chromium*/chrome-*/*"
# A browser window has a minimum width, a frame in it has none.
FRAME = """<body><iframe width="{width}" height="900" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = (event) => {{
  const page = event.target.contentDocument, width = page.documentElement.clientWidth, wide = [];
  for (const one of page.body.querySelectorAll("*"))
    if (one.getBoundingClientRect().right > width + 1 && !one.parentElement.closest(".scroll, p:has(> img)"))
      wide.push(one.tagName);
  const tables = page.querySelectorAll(".scroll").length;
  document.title = [page.documentElement.scrollWidth - width, tables, ...wide].join(" ");
}};
</script></body>"""


def browser() -> str | None:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    places = (place for place in glob.glob(os.path.expanduser(PLAYWRIGHT)) if os.access(place, os.X_OK))
    return found or next((place for place in places if pathlib.Path(place).name in ("chrome", "headless_shell")), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    written = tmp_path_factory.mktemp("report")
    write_report(written, synthetic_inputs(size=60))
    return (written / "report.html").read_text(encoding="utf-8")


def beyond(page: str, width: int, folder: pathlib.Path) -> list[str]:
    """By how many pixels the page is wider than its window, its number of tables, and the elements that overflow."""
    command = browser()
    if command is None:
        pytest.skip(f"no browser is installed; one of {', '.join(NAMES)} would run this test")
    (folder / "frame.html").write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    # The browser's sandbox needs privileges that root in a container lacks.
    options = ["--headless", "--disable-gpu", "--no-sandbox", f"--user-data-dir={folder / 'profile'}"]
    options += ["--virtual-time-budget=10000", "--dump-dom", (folder / "frame.html").as_uri()]
    found = subprocess.run([command, *options], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>([^<]*)</title>", found.stdout)
    assert title, found.stderr
    return title[1].split()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(page, width, tmp_path):
    excess, tables, *wide = beyond(page, width, tmp_path)
    assert (excess, wide) == ("0", []) and int(tables) > 8


def test_overflowing_elements_are_found(page, tmp_path):
    broken = page.replace(".scroll { overflow-x: auto;", ".scroll {").replace("max-width: 100%;", "")
    assert broken != page and int(beyond(broken, 390, tmp_path)[0]) > 0
