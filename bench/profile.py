"""The timeline of one training step: how much of it is the optimizer, and what bounds that."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiled

from fused_optim import FusedOptimizer
from fused_optim.backends import choice
from fused_optim.eager.steps import EagerSteps

from .contenders import contenders_for, ours
from .footprint import bytes_of_step, optimizer_of, state_bytes
from .material import Material, make_material
from .measure import Copy
from .optimizers import Recipe, Stepper
from .shapes import Model

OPTIMIZER = "optimizer step"
MODEL = "forward and backward"
PHASES = {
    "refresh": "refresh (addresses and hyperparameters)",
    "reduce": "reduce (norms)",
    "apply": "apply (reduce, prepare, apply)",
}
EAGER = "eager (torch operations)"
REST = "Python around the phases"
WAITING = "the device, after the call has returned"
WARM_UP, TIMED = 3, 5  # steps
BOUND = 0.6  # the share of a step from which on something is called its bound


class Stopwatch:
    """Seconds by name, each moment counted once: what runs within a phase under another name is not the phase's.

    The ranges of torch.profiler cost tens of microseconds a step, a stopwatch a few.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def __call__(self, name: str) -> Lap:
        return Lap(self, name)

    def begin(self, name: str) -> None:
        self._lap()
        self._running.append(name)

    def end(self) -> None:
        self._lap()
        self._running.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class Lap:
    def __init__(self, watch: Stopwatch, name: str) -> None:
        self._watch, self._name = watch, name

    def __enter__(self) -> None:
        self._watch.begin(self._name)

    def __exit__(self, *_: object) -> None:
        self._watch.end()


class NamedPhases:
    """A plan whose phases run within what ``around`` makes of their names."""

    def __init__(self, plan: Any, around: Callable[[str], AbstractContextManager[Any]]) -> None:
        self._plan, self._around = plan, around

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._plan, name)
        if name not in PHASES:
            return found

        def named(*arguments: Any) -> Any:
            with self._around(PHASES[name]):
                return found(*arguments)

        return named


@contextmanager
def named_phases(optimizer: Any, around: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within, the phases of one of our optimizers run within ``around(name)``; any other is left alone."""
    if not isinstance(optimizer, FusedOptimizer) or optimizer.plan is None:
        yield
        return
    plan, advance = optimizer.plan, EagerSteps._advance
    native = plan.native
    plan.native = NamedPhases(native, around)  # type: ignore[assignment]

    def named_advance(*arguments: Any) -> Any:
        with around(EAGER):
            return advance(*arguments)

    EagerSteps._advance = named_advance  # type: ignore[method-assign]
    try:
        yield
    finally:
        EagerSteps._advance = advance  # type: ignore[method-assign]
        plan.native = native


def range_of(name: str) -> AbstractContextManager[Any]:
    return record_function(f"fused_optim: {name}")


@dataclass(frozen=True)
class StepProfile:
    """Times in seconds, of the step whose optimizer took the median time.

    ``phases`` add up to ``optimizer``; ``host`` is the calling thread's time in the optimizer, ``copy`` that of a copy
    of the same bytes.
    """

    title: str
    step: float
    optimizer: float
    host: float | None
    moved: int
    copy: float
    phases: dict[str, float]
    trace: Path
    stand_in: bool
    device: str

    @property
    def bound(self) -> str:
        """What the time of the optimizer follows: the host, the memory, or neither alone."""
        if self.host is not None and self.host / self.optimizer >= BOUND:
            return f"host-bound: {min(1.0, self.host / self.optimizer):.0%} of its time is the host's"
        if self.copy / self.optimizer >= BOUND:
            return f"bandwidth-bound: it moves its bytes at {self.copy / self.optimizer:.0%} of a copy's pace"
        share = "" if self.host is None else f", {self.host / self.optimizer:.0%} of its time is the host's"
        return (
            f"bound by neither alone: it moves its bytes at {self.copy / self.optimizer:.0%} of a copy's pace{share}; "
            "what remains is arithmetic, temporaries or many small operations"
        )

    def text(self) -> str:
        whole = "forward and backward (a stand-in: matrix products)" if self.stand_in else "forward and backward"
        step, optimizer = round(self.step * 1e6), round(self.optimizer * 1e6)  # microseconds, so that the lines add up
        lines = [
            f"{self.title}",
            f"  a step takes {step / 1e3:,.3f} ms: {whole} {(step - optimizer) / 1e3:,.3f} ms, "
            f"optimizer {optimizer / 1e3:,.3f} ms ({self.optimizer / self.step:.1%})",
        ]
        lines += [f"    {us / 1e3:>10,.3f} ms  {name}" for name, us in self.microseconds(optimizer).items()]
        lines.append(
            f"  the optimizer moves {self.moved / 1e6:,.1f} MB at least; a copy of as many bytes takes "
            f"{self.copy * 1e3:,.3f} ms"
        )
        if self.host is not None:
            how = "on a twin with two elements a tensor" if self.device == "cpu" else "until the call returns"
            lines.append(f"  the host's share is {self.host * 1e3:,.3f} ms ({how})")
        lines.append(f"  it is {self.bound}")
        lines.append(
            f"  timeline of another step, with what recording costs: {self.trace} "
            "(open it in chrome://tracing or https://ui.perfetto.dev)"
        )
        return "\n".join(lines)

    def microseconds(self, optimizer: int) -> dict[str, int]:
        """The phases in whole microseconds, whose sum is the optimizer's; what rounding leaves is the longest one's."""
        rounded = {name: round(seconds * 1e6) for name, seconds in self.phases.items()}
        if rounded:
            rounded[max(rounded, key=rounded.__getitem__)] += optimizer - sum(rounded.values())
        return rounded


def profile_step(
    forward_backward: Callable[[], Any],
    optimizer: Any,
    trace: str | Path = "trace.json",
    *,
    title: str = "training step",
    host: float | None = None,
    stand_in: bool = False,
) -> StepProfile:
    """Profile training steps of your own and write the timeline of one.

    Args:
        forward_backward: computes the gradients of a batch, ``optimizer.zero_grad()`` included; called nine times.
        optimizer: any optimizer; the phases of one of this library are named in the timeline.
        trace: where to write the Chrome trace.
        title: the first line of the text.
        host: seconds of the host in ``optimizer.step()``, where they are known; on CUDA they are measured.
        stand_in: whether ``forward_backward`` is not the real one.

    Returns:
        The times; ``text()`` says them in words.

    Raises:
        ValueError: the optimizer has no parameter with a gradient after ``forward_backward()``.

    Example:
        >>> from fused_optim.bench import profile_step
        >>> print(profile_step(forward_backward, optimizer).text())  # doctest: +SKIP
    """
    inner = optimizer_of(optimizer)
    for _ in range(WARM_UP):
        forward_backward()
        optimizer.step()
    params = [param for group in inner.param_groups for param in group["params"] if param.grad is not None]
    if not params:
        raise ValueError("optimizer: no parameter has a gradient after forward_backward()")
    device = params[0].device

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    timed: list[tuple[float, dict[str, float]]] = []  # forward and backward; the optimizer by phases
    for _ in range(TIMED):
        synchronize()
        start = time.perf_counter()
        forward_backward()
        synchronize()
        middle = time.perf_counter()
        watch = Stopwatch()
        with named_phases(inner, watch):
            with watch(REST):
                optimizer.step()
            if device.type == "cuda":
                with watch(WAITING):
                    synchronize()
        timed.append((middle - start, watch.seconds))
    timed.sort(key=lambda step: sum(step[1].values()))
    model_time, phases = timed[TIMED // 2]
    optimizer_time = sum(phases.values())
    if device.type == "cuda":
        host = optimizer_time - phases[WAITING]
    moved = bytes_of_step(Material(Model("", ()), [params]), state_bytes(optimizer))
    copy = Copy(moved, device)
    copied = moved / max(copy.bytes_per_second() for _ in range(TIMED))  # the limit is the best that it does
    del copy
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with named_phases(inner, range_of), profiled(activities=activities, acc_events=True) as recorded:
        with record_function(MODEL):
            forward_backward()
        with record_function(OPTIMIZER):
            optimizer.step()
        synchronize()
    trace = Path(trace)
    trace.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(trace))
    return StepProfile(
        title=title,
        step=model_time + optimizer_time,
        optimizer=optimizer_time,
        host=host,
        moved=moved,
        copy=copied,
        phases=phases if isinstance(inner, FusedOptimizer) else {},
        trace=trace,
        stand_in=stand_in,
        device=device.type,
    )


def stand_in(material: Material, tokens: int) -> Callable[[], None]:
    """Forward and backward of each matrix by itself: three products, 6 operations a parameter and token.

    A parameter of one dimension is added to by a sum. The gradients are written in place, as with
    ``zero_grad(set_to_none=False)``.
    """
    work: list[tuple[Tensor, Tensor, Tensor]] = []
    for param in material.flat:
        if param.dim() > 1 and param.numel():
            outputs = param.shape[0]
            inputs = torch.randn(tokens, param.numel() // outputs, dtype=param.dtype, device=param.device)
            work.append((param, inputs, torch.randn(tokens, outputs, dtype=param.dtype, device=param.device)))

    def forward_backward() -> None:
        with torch.no_grad():
            for param, inputs, output_grad in work:
                matrix = param.view(param.shape[0], -1)
                outputs = inputs @ matrix.T
                outputs.mul_(output_grad)
                output_grad @ matrix
                scale = 1e-2 / math.sqrt(tokens)
                torch.mul(output_grad.T @ inputs, scale, out=param.grad.view_as(matrix))  # type: ignore[union-attr]

    return forward_backward


def profile_model(
    model: Model,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
    backend: str | None,
    peers: Sequence[str],
    tokens: int,
    trace: Path,
) -> StepProfile:
    """Profile one of our optimizers, or a peer, on the shapes of a model.

    Raises:
        ValueError: the backend or the peer cannot be used here; the text says why.
    """
    if peers:
        found, absent = contenders_for(recipe, device, (), peers)
        chosen = [contender for contender in found if not contender.ours]
        if not chosen:
            raise ValueError("; ".join(f"--peer {name}: {reason}" for name, reason in absent if name in peers))
        contender = chosen[0]
    else:
        backend = backend or choice.choose(device)[0]
        reason = choice.why_missing(backend, device.index)
        if reason is not None:
            raise ValueError(f"--backend {backend} cannot be used: {reason}")
        if not choice.takes(backend, device):
            raise ValueError(f"--backend {backend} takes no tensor on {device}")
        contender = ours(recipe, backend)

    def made(shapes: Model) -> tuple[Material, Stepper]:
        material = make_material(contender.model(shapes), dtype, device)
        return material, contender.make(material)

    host = None
    if device.type == "cpu" and not contender.compiles:
        _, twin = made(model.twin())
        for _ in range(WARM_UP):
            twin.step()
        samples = []
        for _ in range(20):
            start = time.perf_counter()
            twin.step()
            samples.append(time.perf_counter() - start)
        host = statistics.median(samples)
    material, stepper = made(model)
    title = f"{contender.name} {recipe.name}, {model.name} ({model.numel / 1e6:,.1f} M), {dtype}, {device.type}"
    return profile_step(stand_in(material, tokens), stepper, trace, title=title, host=host, stand_in=True)
