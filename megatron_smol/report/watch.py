"""`smol report --watch`: the page of a run that trains, written anew until the run ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from megatron_smol.report.render import Report


def keep_writing(report: Report, every: float, wait: Callable[[float], None] = time.sleep) -> None:
    """Write now and every `every` seconds, until all runs are complete or Ctrl-C; the last page does not reload."""
    pages = 0
    try:
        while True:
            complete = report.write(every)
            pages += 1
            now = time.strftime("%H:%M:%S")
            print(f"\r{now} page {pages}, again in {every:g} s ", end="", file=sys.stderr, flush=True)
            if complete:
                break
            wait(every)
    except KeyboardInterrupt:
        report.write()
    print(file=sys.stderr)
