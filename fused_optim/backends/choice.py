"""Which backend serves a parameter: the choice, its reasons, how a user forces it, and the log where it is another."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterable

import torch

from . import extension

logger = logging.getLogger("fused_optim")

OLDEST_TRITON = (3, 4)
BACKENDS = ("cuda", "triton", "cpu", "eager")
AUTOMATIC = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


def why_missing(backend: str, device: int | None = None) -> str | None:
    """Why a backend cannot be used in this process, on a CUDA device by its index; None if it can."""
    if backend == "cpu":
        return extension.missing
    if backend == "cuda":
        return extension.missing or _why_no_cuda(device or 0)
    if backend == "triton":
        return _why_no_triton()
    return None


@functools.cache
def _why_no_cuda(device: int) -> str | None:
    if extension._C is None:
        return extension.missing
    if not torch.cuda.is_available():  # asked first: torch's answer does not spoil a later fork
        built = extension._C.build_info()["cuda_version"]
        return "no CUDA device is there" if built else extension._C.why_no_cuda(device)
    return extension._C.why_no_cuda(device) or None


def interprets_triton() -> bool:
    """Whether triton runs kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_no_triton() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    found = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    if found < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {triton.__version__} is too old: install triton>={oldest}"
    if interprets_triton():
        from ..kernels import refresh

        return None if refresh.INTERPRETED else "TRITON_INTERPRET was set after the kernels had been imported"
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is there, and TRITON_INTERPRET=1 is not set"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a missing C compiler, an unusable driver: triton raises what it likes
        return f"triton has no driver that it can use: {error}"
    return None


def takes(backend: str, device: torch.device) -> bool:
    """Whether a backend works on tensors of a device at all."""
    if backend == "triton":
        return device.type == ("cpu" if interprets_triton() else "cuda")
    return backend in ("eager", device.type)


def requested(backend: str | None) -> str | None:
    """The backend that the user asked for: the argument, then FUSED_OPTIM_BACKEND, then None.

    Raises:
        ValueError: the name is not one of ``"cuda"``, ``"triton"``, ``"cpu"``, ``"eager"``.
    """
    source = "backend"
    if backend is None:
        backend = os.environ.get("FUSED_OPTIM_BACKEND") or None
        source = "FUSED_OPTIM_BACKEND"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is not a backend; choose from {', '.join(BACKENDS)}")
    return backend


def check_forced(backend: str, devices: Iterable[torch.device]) -> None:
    """Refuse a forced backend that cannot be loaded or has no tensor to work on.

    Raises:
        RuntimeError: the backend is missing here; the text says why.
        ValueError: no parameter is on one of its devices.
    """
    devices = set(devices)
    taken: set[int | None] = {device.index for device in devices if takes(backend, device)}
    for index in taken or {None}:  # no other device is asked: a CUDA context takes memory
        reason = why_missing(backend, index)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot be used: {reason}")
    if devices and not taken:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"backend={backend!r} takes no tensor on {names}; leave backend=None to choose by device")


def choose(device: torch.device, forced: str | None = None) -> tuple[str, str | None]:
    """The backend for tensors of a device, and why a better one is passed over (None if none is)."""
    if forced is not None:
        if takes(forced, device):
            return forced, None
        return "eager", f"backend={forced!r} takes no tensor on {device}"
    reasons: list[str] = []
    for backend in AUTOMATIC.get(device.type, ("eager",)):
        if takes(backend, device):
            reason = why_missing(backend, device.index)
        else:
            reason = "under TRITON_INTERPRET=1 it takes CPU tensors"
        if reason is None:
            return backend, "; ".join(reasons) or None
        reasons.append(f"no {backend} backend: {reason}")
    raise AssertionError("the eager backend is always there")


class FallbackLog:
    """Writes one line for each kind of fallback of an optimizer.

    Args:
        name: the optimizer's class.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: set[str] = set()

    def serves(self, what: str, reason: str, kind: str | None = None, served_by: str = "eager") -> None:
        """Say that another path serves ``what`` than the best there is, and why."""
        path = "eager path" if served_by == "eager" else f"{served_by} backend"
        self.once(kind or reason, "%s: the %s serves %s: %s", path, what, reason)

    def once(self, kind: str, message: str, *arguments: str) -> None:
        """Say what happens, the first time that this kind of thing does; ``message`` begins with the name."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning(message, self._name, *arguments)

    def tells(self, message: str, *arguments: str) -> None:
        """Say what a user has asked for in part only; ``message`` begins with the name."""
        logger.info(message, self._name, *arguments)
