"""What the engine uses of PEFT. It is imported here alone, without what bitsandbytes then says of optional kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _silent_bitsandbytes() -> Iterator[None]:
    """Silence the warnings of bitsandbytes."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# PEFT imports bitsandbytes wherever it is installed.
with _silent_bitsandbytes():
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

__all__ = ["LoraLayer", "PeftLoraConfig", "inject_adapter_in_model"]
