"""Devices by peak FLOPs, and what hours of them cost."""

from typing import NamedTuple

from koclip.config import ConfigError


class Device(NamedTuple):
    """A device as its maker describes it: dense peak TFLOPS (tensor cores in 16 bits), memory and power."""

    tflops_16: float  # fp16 and bf16, with fp32 accumulation
    tflops_32: float  # fp32 without TF32, as PyTorch multiplies by default
    memory_gib: float
    watts: float
    source: str


DEVICES = {
    "v100": Device(125, 15.7, 32, 300, "NVIDIA V100 data sheet, SXM2"),
    "a100": Device(312, 19.5, 80, 400, "NVIDIA A100 data sheet, SXM4 80 GB"),
    "h100": Device(989, 67, 80, 700, "NVIDIA H100 data sheet, SXM5, without sparsity"),
    "h200": Device(989, 67, 141, 700, "NVIDIA H200 data sheet, SXM5, without sparsity"),
    "l4": Device(121, 30.3, 24, 72, "NVIDIA L4 data sheet, without sparsity"),
}


class PaperRun(NamedTuple):
    """A run of Radford et al. 2021 (section 2.5): 32 epochs of 400 million pairs on V100s."""

    preset: str
    num_devices: int
    days: float


PAPER_RUNS = (PaperRun("vit_l14", 256, 12), PaperRun("rn50x64", 592, 18))
PAPER_PAIRS = 32 * 400_000_000


def named_device(name: str) -> Device:
    """Return a device of the table.

    Raises:
        ConfigError: the table does not have it.
    """
    if name not in DEVICES:
        raise ConfigError(f"device: got {name!r}, expected one of {', '.join(DEVICES)}; or measure: --steps 20")
    return DEVICES[name]


def peak_flops(device: Device, precision: str) -> float:
    """Return the peak FLOPs per second of a device in a precision: `fp32`, `fp16` or `bf16`."""
    return 1e12 * (device.tflops_32 if precision == "fp32" else device.tflops_16)


def implied_utilization(flops_per_pair: float, num_pairs: float, device_seconds: float, peak: float) -> float:
    """Return the share of the peak FLOPs that a finished run has used: model FLOPs utilization (MFU)."""
    return flops_per_pair * num_pairs / (device_seconds * peak)


def energy_kwh(hours: float, num_devices: int, watts: float) -> float:
    """Return the energy of some devices, kWh. Their host and cooling are not in it."""
    return hours * num_devices * watts / 1000
