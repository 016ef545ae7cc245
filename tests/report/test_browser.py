"""The page in a real browser, where there is one: every chart is drawn and no script fails."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.fake_run import small_plan, write_report, write_run
from tests.report.page import charts

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_chart_without_a_script_error(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "small", small_plan()))
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("<canvas") == len(charts(page.read_text()))
    assert "CONSOLE" not in done.stderr
