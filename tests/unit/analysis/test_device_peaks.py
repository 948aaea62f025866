"""What devices can compute, by the names that drivers give them."""

from __future__ import annotations

import pytest

from qz3_widgets.analysis.device_peaks import peak_flops
from qz3_widgets.analysis.summary import _utilization


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


def test_nothing_is_said_of_others() -> None:
    assert peak_flops(None) is None
    assert peak_flops("CPU, 40 cores") is None  # A40 is another thing
    assert peak_flops("NVIDIA GeForce GTX 1080") is None


def test_utilization_is_tokens_times_operations_over_the_peak() -> None:
    assert _utilization(1000.0, 5 * 10**10, "NVIDIA A100-SXM4-80GB") == pytest.approx(5e13 / 312e12)
    assert _utilization(1000.0, None, "NVIDIA A100-SXM4-80GB") is None
    assert _utilization(None, 5 * 10**10, "NVIDIA A100-SXM4-80GB") is None
    assert _utilization(1000.0, 5 * 10**10, "CPU, 2 cores") is None
