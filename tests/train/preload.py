"""Imported once by the server that the ranks of faulty.py are forked from."""

from megatron_smol.prepare import prepare_libraries

prepare_libraries()

import megatron_smol.train.run  # noqa: E402, F401
