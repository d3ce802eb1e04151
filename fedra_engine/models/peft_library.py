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
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
    from peft.utils.other import get_pattern_key

__all__ = [
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "LoraLayer",
    "PeftLoraConfig",
    "check_target_module_exists",
    "get_pattern_key",
    "inject_adapter_in_model",
]
