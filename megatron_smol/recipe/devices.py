"""GPUs by name: what their data sheets promise. `speed` multiplies it by what is reached in practice.

All figures are NVIDIA's, dense (no sparsity), per GPU and per direction:
H100 SXM, H200     data sheets H100 (2023) and H200 (2024): 989 and 1979 TFLOP/s, 3.35 and 4.8 TB/s, NVLink 900 GB/s both ways
A100 SXM           data sheet A100 80GB (2021): 312 TFLOP/s, 2.039 TB/s (40 GB: 1.555), NVLink 600 GB/s both ways
B200               data sheet DGX B200 (2024), a GPU's eighth: 2.25 and 4.5 PFLOP/s, 8 TB/s, NVLink 1.8 TB/s both ways
L40S               data sheet (2023): 362 and 733 TFLOP/s, 864 GB/s, PCIe 4 x16
Networks are those of the DGX systems: one 400 Gb/s card a GPU (A100: 200 Gb/s).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from megatron_smol.errors import UserError, nearest


@dataclass(frozen=True)
class Device:
    """memory: decimal bytes; flops per second by kind; rates in bytes per second, one direction."""

    name: str
    memory: float
    bf16_flops: float
    fp8_flops: float | None  # None: no FP8 units
    fp32_flops: float
    memory_rate: float
    link_rate: float  # to GPUs of the same node
    network_rate: float  # of one GPU's own card
    gpus_per_node: int = 8

    def peak_flops(self, precision: str) -> float:
        """Of the precision a recipe names; what MFU is measured against."""
        if precision.startswith("fp8"):
            if self.fp8_flops is None:
                raise UserError(f"{self.name} has no FP8 units; use training.precision=bf16")
            return self.fp8_flops
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


_GB, _TF = 1e9, 1e12
DEVICES = {
    "A100": Device("A100", 80 * _GB, 312 * _TF, None, 19.5 * _TF, 2.039e12, 300 * _GB, 25 * _GB),
    "H100": Device("H100", 80 * _GB, 989.4 * _TF, 1978.9 * _TF, 66.9 * _TF, 3.35e12, 450 * _GB, 50 * _GB),
    "H200": Device("H200", 141 * _GB, 989.4 * _TF, 1978.9 * _TF, 66.9 * _TF, 4.8e12, 450 * _GB, 50 * _GB),
    "B200": Device("B200", 180 * _GB, 2250 * _TF, 4500 * _TF, 75 * _TF, 8e12, 900 * _GB, 50 * _GB),
    "L40S": Device("L40S", 48 * _GB, 362 * _TF, 733 * _TF, 91.6 * _TF, 0.864e12, 32 * _GB, 25 * _GB),
}
_SLOWER_MEMORY = {("A100", 40): 1.555e12}
DEFAULT = "H100"

_CLUSTER = re.compile(r"(?P<gpus>\d+)\s*[x×]\s*(?P<name>[A-Za-z0-9]+)-(?P<memory>\d+)\s*GB", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """So many of one GPU."""

    gpus: int
    device: Device

    def __str__(self) -> str:
        return f"{self.gpus} x {self.device.name} {self.device.memory / _GB:g} GB"


def parse_cluster(text: str) -> Cluster:
    """Read "64xH100-80GB". The memory may be another than the data sheet's (a share of a GPU, another model)."""
    match = _CLUSTER.fullmatch(text.strip())
    if match is None:
        raise UserError(f"'{text}' is not a cluster; write GPUs x NAME-MEMORY, such as 64xH100-80GB")
    name, gpus, memory = match["name"].upper(), int(match["gpus"]), int(match["memory"])
    if name not in DEVICES:
        raise UserError(f"'{match['name']}' in '{text}' is not a GPU known here; {nearest(name, DEVICES)}")
    if not gpus or not memory:
        raise UserError(f"'{text}' has no GPUs or no memory; write such as 64xH100-80GB")
    known = DEVICES[name]
    rate = _SLOWER_MEMORY.get((name, memory), known.memory_rate)
    return Cluster(gpus, replace(known, memory=memory * _GB, memory_rate=rate))


def device_by_cuda_name(name: str) -> Device | None:
    """The table's entry for what torch calls a GPU ("NVIDIA H100 80GB HBM3"), None when it is not there."""
    return next((device for key, device in DEVICES.items() if key in name.upper()), None)
