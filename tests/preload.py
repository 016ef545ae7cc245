"""Imported once by the server that test ranks are forked from (see helpers.run_ranks)."""

from megatron_smol.prepare import prepare_libraries

prepare_libraries()

import megatron_smol.checkpoint.store  # noqa: E402, F401
