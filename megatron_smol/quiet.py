"""Silence what libraries say about themselves at import and that a user can do nothing with.

megatron-core warns once per module that Transformer Engine and Apex are missing; the first line of a run says
what is used instead. Call before importing megatron.
"""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    warnings.filterwarnings("ignore", message=r".*Apex.*")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard looks for TensorFlow
