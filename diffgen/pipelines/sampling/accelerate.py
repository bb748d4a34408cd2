"""Faster networks: compiled blocks, and other implementations of attention. Both change the last bits of a picture."""

from __future__ import annotations

import logging
from typing import Any

import torch

from diffgen.errors import InputError, UsageError
from diffgen.generation.checks import ATTENTION_BACKENDS

NATIVE = "native"


def accelerate(network: Any, backend: str, compiled: bool, *, compiler: str = "inductor") -> None:
    """Have a network attend with a backend of ATTENTION_BACKENDS, and its repeated blocks compiled or not.

    A block is compiled when it first runs with inputs of a shape. Raises UsageError for a network that has no choice,
    InputError for a backend whose package is missing.
    """
    _attend_with(network, backend)
    blocks = getattr(network, "_repeated_blocks", None) or ()
    regions = [module for module in network.modules() if type(module).__name__ in blocks]
    if compiled and not regions:
        raise UsageError(f"--compile is not supported for {type(network).__name__}: it has no repeated blocks")
    if compiled and compiler == "inductor":
        _check_compiler(network.device)
    for module in regions:
        if compiled and module._compiled_call_impl is None:
            module.compile(backend=compiler)
        elif not compiled:
            module._compiled_call_impl = None


def _check_compiler(device: torch.device) -> None:
    """Raise InputError on a CPU without a compiler for C++."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise InputError("--compile needs a C++ compiler on a CPU", "install g++, or leave it out") from error


def _attend_with(network: Any, backend: str) -> None:
    processors = [module.processor for module in network.modules() if hasattr(module, "processor")]
    chosen = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    if backend == NATIVE and all(processor._attention_backend is None for processor in chosen):
        return
    if not chosen:
        raise UsageError(f"--attention-backend is not supported for {type(network).__name__}", "leave it out")
    logging.getLogger("diffusers.models.modeling_utils").setLevel(logging.ERROR)  # that this is experimental
    try:
        network.set_attention_backend(ATTENTION_BACKENDS[backend])
    except (RuntimeError, ImportError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"--attention-backend {backend}: {text}", "leave it out, or install the package") from error
