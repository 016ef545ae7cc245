"""Where models run that megatron-core has no part in (curation, SFT and DPO, evaluation), and the checks before training.

Imports torch only when asked. Training has its own rule, with more to say (model/backend.py).
"""

from __future__ import annotations

import os


def on_gpu() -> bool:
    """Whether there is a GPU that SMOL_DEVICE=cpu does not forbid."""
    import torch

    return os.environ.get("SMOL_DEVICE") != "cpu" and torch.cuda.is_available()
