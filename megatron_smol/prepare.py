"""Import megatron-core once, quietly and fast. Commands call this before anything that needs it.

megatron-core warns once a module that Transformer Engine and Apex are missing (the first line of a run says
what is used instead), and its decorators call `torch.compile` at import, which loads the whole compiler:
3 of 7 seconds, in every rank, for fusions that the CPU backend leaves off.
"""

from __future__ import annotations

import logging
import os
import warnings

from megatron_smol.device import on_gpu


def prepare_libraries() -> None:
    """Importing the package's modules without this gives the same results, slower and with warnings."""
    warnings.filterwarnings("ignore", message=r".*Apex.*")
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard looks for TensorFlow

    import torch

    if on_gpu():
        return
    compile_, torch.compile = torch.compile, lambda model=None, **_: model  # type: ignore[assignment]
    try:
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    finally:
        torch.compile = compile_
