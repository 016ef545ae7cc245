"""megatron_smol: the SmolLM2 recipe as one YAML, run by megatron-core."""

__version__ = "0.1.0"
