"""`prefopt-trl env`: versions, devices and engines, for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

REQUIRED = ["prefopt-trl", "trl", "transformers", "torch", "accelerate", "datasets", "peft", "numpy"]
OTHERS = ["huggingface_hub", "deepspeed", "bitsandbytes", "flash-attn", "liger-kernel", "vllm"]


def print_environment() -> None:
    """Print versions, devices and engines."""
    devices = "no accelerator"
    if torch.accelerator.is_available():
        names = map(torch.get_device_module().get_device_name, range(torch.accelerator.device_count()))
        devices = f"{', '.join(names)} ({torch.accelerator.current_accelerator()})"
    rows = {"platform": platform.platform(), "python": platform.python_version(), "devices": devices}
    rows |= {"CPU cores": str(os.cpu_count()), **{name: _version(name) for name in [*REQUIRED, *OTHERS]}}
    print("\n".join(f"- {name}: {value}" for name, value in rows.items()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
