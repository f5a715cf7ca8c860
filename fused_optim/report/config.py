"""What is installed and which backends serve: `show_config()`."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import TextIO

import torch

from ..backends import extension
from ..backends.choice import AUTOMATIC, choose, why_missing
from ..plan.tensor_shim import tensor_shim
from ..tensors import negative_bit

__version__ = extension.version


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _reader() -> str:
    """What tells the compiled plan where a tensor lies, and why it is not the fast one."""
    assert extension._C is not None
    if tensor_shim() is not None:
        return "torch's C shim"
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if extension._C.knows_exchange_api(api):
        return "DLPack's C exchange API, slower than torch's C shim, which was not found or answers otherwise"
    why = "has none; 2.10 and newer have one" if api is None else "has one of another version"
    return f"a Python function, slower than DLPack's C exchange API: torch {torch.__version__} {why}"


def show_config(*, file: TextIO | None = None) -> None:
    """Print versions, what is compiled in, the backend of each device, and why one is missing.

    Args:
        file: where to print; default ``sys.stdout``.

    Example:
        >>> import fused_optim
        >>> fused_optim.show_config()  # doctest: +ELLIPSIS
        fused_optim ...
    """
    out = sys.stdout if file is None else file
    lines = [
        ("fused_optim", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _installed("triton")),
        ("platform", platform.platform()),
    ]
    if extension._C is None:
        lines.append(("extension", f"missing: {extension.missing}"))
    else:
        info = extension._C.build_info()
        cuda = f"CUDA {info['cuda_version']} for {info['cuda_archs']}" if info["cuda_version"] else "no CUDA"
        lines += [
            ("extension", f"compiled by {info['compiler']}, {cuda}"),
            ("cpu capability", f"{extension._C.cpu_capability()} of {info['cpu_capabilities']}"),
            ("cpu threads", "torch's OpenMP runtime" if extension._C.has_openmp() else "std::thread"),
            ("tensor reader", _reader()),
            (
                "pending negations",
                "a bit that is read in each tensor"
                if negative_bit()
                else "each tensor is asked, slower: the bit was not found in this torch",
            ),
        ]
    for device in AUTOMATIC:
        present = device == "cpu" or torch.cuda.is_available()
        backend, _ = choose(torch.device(device))
        lines.append((f"{device} tensors", f"{backend} backend" + ("" if present else " (no such device here)")))
    for backend in ("cuda", "triton", "cpu"):
        reason = why_missing(backend)
        if reason is not None:
            lines.append((f"no {backend} backend", "no extension" if reason == extension.missing else reason))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}", file=out)
