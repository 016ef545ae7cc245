"""What the model is given at once: token windows, their targets, and where their documents lie.

Made by data/loader.py from windows of ids, read by train/step.py. A document ends with the end-of-document id,
which belongs to the document it ends. A window starts anywhere in a document; what it holds of its first
document counts as a document of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_smol.data.indexed import TokenArray

# A label that carries no loss; the same number as in PyTorch's cross_entropy and in transformers.
IGNORED = -100


@dataclass
class Documents:
    """Where documents lie in the b*s tokens of a micro-batch, laid end to end: for varlen attention.

    cu_seqlens: [documents + 1] int32, the first token of each and the end, as FlashAttention's and Transformer
    Engine's "thd" kernels take it. No document reaches over the end of a window.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    shape: torch.Size  # [b, s]

    @classmethod
    def of(cls, tokens: TokenArray, eod_id: int) -> Documents:
        """tokens: [b, s] ids in the host's memory."""
        count, length = tokens.shape
        ends = tokens.reshape(-1) == eod_id
        ends[length - 1 :: length] = True
        bounds = np.concatenate([[0], np.flatnonzero(ends) + 1])
        longest = int(np.diff(bounds).max())
        return cls(torch.from_numpy(bounds.astype(np.int32)), longest, torch.Size((count, length)))

    def to(self, device: torch.device) -> Documents:
        return Documents(self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen, self.shape)

    def numbers(self) -> Tensor:
        """[b, s] int64: which document each token belongs to, counted through the micro-batch."""
        lengths = self.cu_seqlens.diff()
        which = torch.arange(len(lengths), device=lengths.device)
        # The size is given, so that a GPU need not be asked for the sum.
        return torch.repeat_interleave(which, lengths, output_size=self.shape.numel()).view(self.shape)

    def positions(self) -> Tensor:
        """[b, s] int64: positions that start at 0 in every document."""
        place = torch.arange(self.shape.numel(), device=self.cu_seqlens.device)
        return place.view(self.shape) - self.cu_seqlens[:-1].long()[self.numbers()]


@dataclass
class MicroBatch:
    """tokens, labels: [b, s] int64. `documents`: attention stops at their ends; None: it is causal over the window.

    real_tokens: how many labels are not IGNORED; None when that is all of them by construction, and no rank
    need be asked.
    """

    tokens: Tensor
    labels: Tensor
    documents: Documents | None = None
    real_tokens: int | None = None

    @classmethod
    def of(
        cls,
        windows: TokenArray,
        device: torch.device,
        mask_eod: int | None = None,
        ignored: np.ndarray | None = None,
    ) -> MicroBatch:
        """windows: [b, s + 1] ids; ignored: [b, s] bool, labels that carry no loss.

        With `mask_eod`, attention stops at documents, which end with that id.
        """
        shape = (windows.shape[0], windows.shape[1] - 1)
        on_gpu = device.type == "cuda"
        # The only copy on the host: from the type of the files to int64, straight into memory that a GPU can reach.
        tokens, labels = (torch.empty(shape, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2))
        tokens.numpy()[:] = windows[:, :-1]
        targets = labels.numpy()
        targets[:] = windows[:, 1:]
        real = None
        if ignored is not None:
            targets[ignored] = IGNORED
            real = int(ignored.size - np.count_nonzero(ignored))
        documents = None if mask_eod is None else Documents.of(windows[:, :-1], mask_eod).to(device)
        if on_gpu:
            tokens, labels = tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        return cls(tokens, labels, documents, real)

    @property
    def mask(self) -> Tensor | None:
        """[b, 1, s, s] bool, True where attention may look, or None: causal. Made anew each time: it is large."""
        if self.documents is None:
            return None
        from megatron_smol.model.attention import documents_mask

        return documents_mask(self.documents.numbers())

    @property
    def positions(self) -> Tensor:
        """[b, s] int64: from 0 in every document under a document mask, else in every window.

        Rotary attention sees differences of positions only, so it computes the same with and without the reset;
        kernels and tools that take absolute positions need it.
        """
        if self.documents is not None:
            return self.documents.positions()
        return torch.arange(self.tokens.size(1), device=self.tokens.device).expand_as(self.tokens)

    @property
    def loss_mask(self) -> Tensor:
        """[b, s] bool: which labels carry loss."""
        return self.labels != IGNORED
