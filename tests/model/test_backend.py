"""The seam to the CPU: what is rewritten, and that another megatron-core is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_smol.errors import UserError
from megatron_smol.model import backend


def test_literals_are_replaced_in_nested_code_and_tuples() -> None:
    def outer(tensor: torch.Tensor) -> object:
        def inner() -> bool:
            return tensor.type() in ["torch.cuda.HalfTensor", "torch.cuda.FloatTensor"]

        return inner(), torch.zeros(1, device="cuda").device.type

    code, count = backend._without_cuda_literals(outer.__code__)
    assert count == 3
    outer.__code__ = code
    assert outer(torch.zeros(1)) == (True, "cpu")


def test_another_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    with pytest.raises(UserError, match=r"0\.17\.0 is installed.*exactly 0\.16\.1"):
        backend._check_megatron_core()


def test_a_changed_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Literals already replaced (or moved by a patched install) do not count up to what 0.16.1 has."""
    backend.use_cpu()
    with pytest.raises(UserError, match="it was changed"):
        backend.use_cpu.__wrapped__()


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMOL_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cpu only"):
        backend.backend.__wrapped__()


def test_random_streams_are_apart() -> None:
    tracker = backend.CpuRngTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    outside = torch.get_rng_state()
    with tracker.fork("a"):
        first = torch.rand(3)
    with tracker.fork("b"):
        other = torch.rand(3)
    with tracker.fork("a"):
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    assert not torch.equal(first, second) and not torch.equal(first, other)
    tracker.add("c", 1)
    with tracker.fork("c"):
        assert torch.equal(torch.rand(3), first)
