"""`prefopt-trl env`: what a bug report needs to say."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from prefopt_trl import __version__

PACKAGES = ["trl", "transformers", "torch", "accelerate", "datasets", "peft", "numpy", "huggingface_hub"]
ENGINES = ["deepspeed", "bitsandbytes", "flash-attn", "liger-kernel", "vllm"]


def print_environment() -> None:
    """Print versions, devices and engines."""
    rows = {
        "prefopt-trl": __version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "CPU cores": str(os.cpu_count()),
        **{name: _version(name) for name in ENGINES},
    }
    print("\n".join(f"- {name}: {value}" for name, value in rows.items()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.accelerator.is_available():
        return "no accelerator"
    names = [torch.get_device_module().get_device_name(index) for index in range(torch.accelerator.device_count())]
    return f"{', '.join(names)} ({torch.accelerator.current_accelerator()})"
