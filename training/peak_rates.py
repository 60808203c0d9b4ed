"""Peak rates of matrix products on GPUs, for the model FLOP utilization (MFU)."""

import torch

# Dense peak rates in TFLOP/s for float16 and bfloat16, TF32, and float32, from NVIDIA's data sheets
# (sheets that state rates with sparsity: half of these). The first name that is part of the
# device's name applies.
PEAK_TFLOPS = {
    "GB200": (2500.0, 1250.0, 80.0),
    "B200": (2250.0, 1100.0, 75.0),
    "H200 NVL": (835.5, 417.5, 60.0),
    "H200": (989.4, 494.7, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.5, 417.5, 60.0),
    "H100": (989.4, 494.7, 67.0),
    "H800 PCIe": (756.0, 378.0, 51.0),
    "H800": (989.4, 494.7, 67.0),
    "H20": (148.0, 74.0, 44.0),
    "A100": (312.0, 156.0, 19.5),
    "A800": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
}


def find_peak_rate(device: torch.device, dtype: torch.dtype, allow_tf32: bool) -> float | None:
    """Return the dense peak rate of a device in FLOP/s, or None if the device is not in the table.

    Args:
        device: The device.
        dtype: Dtype of matrix products.
        allow_tf32: Whether float32 products use TF32.
    """
    if device.type != "cuda":
        return None
    device_name = torch.cuda.get_device_name(device)
    if "MIG" in device_name:  # a part of a GPU
        return None
    column = 0 if dtype != torch.float32 else (1 if allow_tf32 else 2)
    for name, rates in PEAK_TFLOPS.items():
        if name in device_name:
            return rates[column] * 1e12
    return None
