"""Tell a person what became of a leg: the command in ALERT gets one line of JSON, and the same in words as $MESSAGE.

    ALERT='curl -sf --json @- https://alerts.example.org/smol'
    ALERT='mail -s "$MESSAGE" me@example.org'

An alert that cannot be sent is told in the log and changes nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

SECONDS = 30


def send(command: str, message: str, facts: dict[str, Any], seconds: float = SECONDS) -> str:
    """Run it in bash; why it failed, "" when it did not."""
    environment = os.environ | {"MESSAGE": message}
    text = json.dumps({"message": message, **facts}) + "\n"
    try:
        done = subprocess.run(
            ["bash", "-c", command], input=text, capture_output=True, text=True, timeout=seconds, env=environment
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end after {seconds:.0f} s"
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else f"code {done.returncode}: {done.stderr.strip()[-300:]}"
