"""Silence messages that other libraries give at every start and that the user can do nothing about."""

import logging
import warnings

# trl 1.16 and peft 0.21 use the names that transformers 5 deprecates. To go when they use the new ones.
RENAMED = r"`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
# Loggers, and what they log when the library is imported on a machine without a GPU. To go when they log it as debug.
ON_IMPORT = {
    "DeepSpeed": "Setting accelerator to CPU",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def quiet_libraries() -> None:
    """Silence these messages and no others. Filters of the user, such as `python -W error`, come first."""
    warnings.filterwarnings("ignore", RENAMED, FutureWarning, append=True)
    for name in ON_IMPORT:
        logging.getLogger(name).addFilter(_is_not_on_import)  # added once, however often this is called


def _is_not_on_import(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ON_IMPORT[record.name])
