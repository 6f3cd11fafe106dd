"""The arithmetic that has fast device code, behind one small interface.

Knows tensors and fp8 numbers; knows no layer, cache or request. There are two backends: `torch`, the
reference, which runs everywhere, and `tilelang`, which is loaded only when asked for and needs a
CUDA device.

    kernels = get_kernels("torch", "cpu")
    y, scale = kernels.act_quant(x, "ue8m0")        # x ~ y * scale, one scale per 128 channels
    scores = kernels.index_scores(q, weights, keys, key_scale)
"""

from __future__ import annotations

import importlib.util
from typing import get_args

import torch

from dsatrace.model.config import KernelBackend
from dsatrace.model.kernels.interface import Kernels


def get_kernels(name: str = "torch", device: torch.device | str = "cpu") -> Kernels:
    """The backend called `name` for tensors on `device`.

    Raises `ValueError` for an unknown name, and for `tilelang` without a CUDA device or
    without its package.
    """
    if name == "torch":
        from dsatrace.model.kernels.torch_kernels import TorchKernels

        return TorchKernels()
    if name != "tilelang":
        choices = ", ".join(get_args(KernelBackend))
        raise ValueError(f"kernel backend must be one of {choices}, not {name!r}")
    device = torch.device(device)
    missing = []
    if device.type != "cuda":
        missing.append(f"the device is {str(device)!r}")
    elif not torch.cuda.is_available():
        missing.append("no CUDA device was found")
    if importlib.util.find_spec("tilelang") is None:
        missing.append("tilelang is not installed")
    if missing:
        raise ValueError(
            f"kernel backend 'tilelang' cannot run: {' and '.join(missing)}; use the backend 'torch', "
            "or a CUDA device after pip install 'dsatrace[gpu]'"
        )
    from dsatrace.model.kernels.tilelang_kernels import TilelangKernels

    return TilelangKernels(device)
