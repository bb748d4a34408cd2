"""Environment variables to set before torch, diffusers and transformers are imported."""

from __future__ import annotations

import os

ALWAYS = {
    "OMP_WAIT_POLICY": "passive",  # idle OpenMP threads sleep: spinning ones halve the speed where cores are shared
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # diffgen itself reports what concerns the user
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def prepare(offline: bool = False) -> None:
    """Set the variables that the user has not set; with `offline`, switch the network off in any case."""
    for name, value in ALWAYS.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ.update(OFFLINE)
