"""What GPUs can compute at most, for model FLOPs utilization: dense bf16 (of the older ones fp16) products.

Figures of the makers' data sheets, without sparsity.
"""

from __future__ import annotations

_TFLOPS: tuple[tuple[str, float], ...] = (
    # The longer names first: the first that is in a device's name counts.
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def peak_flops(device_name: str | None) -> float | None:
    """Operations a second of a device, by its driver's name; ``None`` for one that is not known, and for a CPU."""
    if device_name is None or device_name.startswith("CPU"):
        return None
    found = next((tflops for name, tflops in _TFLOPS if name.lower() in device_name.lower()), None)
    return None if found is None else found * 1e12
