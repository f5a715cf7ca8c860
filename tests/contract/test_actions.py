"""Whatever users do between steps, in any order: cpu, eager and Triton's interpreter against a small reference.

The reference holds what a parameter's optimizer should remember (buffer, step count, master) and takes the parameter as
it finds it: whatever the user has written into that counts. It is NumPy and shares no code with what it judges. Every
action is done to the parameters of each backend alike, so that they must hold the same bits after each step.
"""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor
from torch.nn import Parameter

import fused_optim

SHAPES = ((3,), (2, 3), (), (4, 1))
MOMENTUM = 0.5
NUMBERS = st.sampled_from([0.0, 0.0, -0.0, 1.0, -1.5, 2.0**-10, 0.3, 3e38, 1e-40])
GRADS = st.sampled_from([0.0, 2.0**-10, -(2.0**-9), 0.7, -1.0, 3.0])
THEN = st.one_of(st.none(), GRADS)  # what a step right after an action has for a gradient; None: no step


# The reference ----------------------------------------------------------------------------------------------------


def bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


def to_nearest_even(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, as float32."""
    word = bits(values)
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(values), np.float32(np.nan), rounded.astype(np.uint32).view(np.float32))


def ties_away(values: np.ndarray) -> np.ndarray:
    rounded = (bits(values) + 0x8000) & 0xFFFF0000
    return np.where(np.isnan(values), np.float32(np.nan), rounded.astype(np.uint32).view(np.float32))


@dataclass
class Remembered:
    """What is kept of one parameter."""

    step: int = 0
    buffer: np.ndarray | None = None
    buffer_is_bfloat16: bool = False
    master: np.ndarray | None = None  # float32; of "split" only what the bits below the parameter say

    def seen(self, param: np.ndarray, kind: str) -> np.ndarray:
        """The float32 number of each element: the parameter, and below it what the master adds."""
        if self.master is None:
            return param
        if kind == "float32":
            return np.where(bits(ties_away(self.master)) == bits(param), self.master, param)
        remainder = bits(self.master) - bits(ties_away(self.master))
        whole = (bits(param) + remainder).view(np.float32)
        return np.where(np.isnan(whole), param, whole)

    def make_states(self, param: np.ndarray, kind: str | None, narrow: bool) -> None:
        if self.buffer is None:
            self.buffer, self.buffer_is_bfloat16 = np.zeros_like(param), narrow and kind is None
        if not narrow:
            self.buffer_is_bfloat16 = False
        if narrow and kind is not None and self.master is None:
            self.master = param

    def take_step(self, param: np.ndarray, grad: np.ndarray, lr: float, kind: str | None, narrow: bool) -> np.ndarray:
        """The parameter after a step; ``narrow``: it is bfloat16."""
        self.step += 1
        self.make_states(param, kind, narrow)
        assert self.buffer is not None
        has_master = narrow and kind is not None
        whole = self.seen(param, kind) if has_master and kind is not None else param
        decay, weight = (0.0, 1.0) if self.step == 1 else (MOMENTUM, 1.0)
        with np.errstate(all="ignore"):
            buffer = np.float32(decay) * self.buffer + np.float32(weight) * grad
            whole = whole - np.float32(lr) * buffer
        self.buffer = to_nearest_even(buffer) if self.buffer_is_bfloat16 else buffer
        if has_master:
            self.master = whole
            return ties_away(whole)
        return to_nearest_even(whole) if narrow else whole


# The actions --------------------------------------------------------------------------------------------------------


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy().copy()


@dataclass
class World:
    """The parameters of one backend, in an order that stays, and their optimizer."""

    params: list[Parameter]
    optimizer: Any


class Actions(RuleBasedStateMachine):
    backends: ClassVar[tuple[str, ...]]
    kind: str | None

    @initialize(
        kind=st.sampled_from([None, "float32", "split", "float32", "split"]),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        narrow=st.lists(st.sampled_from([True, True, False]), min_size=3, max_size=3),
        views=st.booleans(),
    )
    def begin(self, kind: str | None, shapes: list[tuple[int, ...]], narrow: list[bool], views: bool) -> None:
        self.kind = kind
        self.lrs = [0.25, 0.125]
        self.remembered = [Remembered() for _ in shapes]
        self.away: set[int] = set()
        self.worlds = {}
        for backend in self.backends:
            params = self.new_params(shapes, narrow, views)
            halves = [params[:1], params[1:]]
            self.worlds[backend] = World(params, self.make(backend, halves))
        self.swapped: dict[str, list[Tensor]] | None = None

    def new_params(self, shapes: list[tuple[int, ...]], narrow: list[bool], views: bool) -> list[Parameter]:
        generator = torch.Generator().manual_seed(3)
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        if views:  # all of one buffer, and so of one dtype
            dtype = torch.bfloat16 if narrow[0] else torch.float32
            flat = torch.cat([value.flatten() for value in values]).to(dtype)
            parts = flat.split([value.numel() for value in values])
            return [Parameter(part.view(value.shape)) for part, value in zip(parts, values, strict=True)]
        return [
            Parameter(value.to(torch.bfloat16 if is_narrow else torch.float32))
            for value, is_narrow in zip(values, narrow, strict=False)
        ]

    def make(self, backend: str, groups: list[list[Parameter]]) -> Any:
        return fused_optim.SGD(
            [{"params": params, "lr": lr} for params, lr in zip(groups, self.lrs, strict=True)],
            lr=1.0,
            momentum=MOMENTUM,
            master_weights=self.kind,
            backend=backend,
        )

    def each(self) -> list[World]:
        return list(self.worlds.values())

    def member(self, index: int) -> int:
        return index % len(self.remembered)

    def group_of(self, index: int) -> int:
        return 0 if index == 0 else 1

    # Steps

    def set_grads(self, grads: list[float | None], layout: str) -> None:
        for world in self.each():
            for index, param in enumerate(world.params):
                value = grads[index % len(grads)]
                if value is None:
                    param.grad = None
                    continue
                grad = torch.full_like(param, value)
                if grad.numel() > 1:
                    grad.view(-1)[0] = -value
                if layout == "transposed" and grad.dim() == 2:
                    grad = grad.t().contiguous().t()
                elif layout == "negated":
                    grad = torch._neg_view(-grad)
                elif layout == "expanded":
                    grad = torch.full((), value, dtype=param.dtype).expand(param.shape)
                param.grad = grad

    def expect_step(self, factor: float = 1.0) -> list[np.ndarray]:
        world = self.worlds["cpu"]
        expected = []
        for index, param in enumerate(world.params):
            values = array(param)
            if param.grad is not None and index not in self.away:
                narrow = param.dtype == torch.bfloat16
                lr = self.lrs[self.group_of(index)]
                grad = np.float32(factor) * array(param.grad.resolve_neg())
                values = self.remembered[index].take_step(values, grad, lr, self.kind, narrow)
            expected.append(values)
        return expected

    def compare(self, expected: list[np.ndarray]) -> None:
        for backend, world in self.worlds.items():
            for index, (param, wanted) in enumerate(zip(world.params, expected, strict=True)):
                found = array(param)
                same = (bits(found) == bits(wanted)) | (np.isnan(found) & np.isnan(wanted))
                assert same.all(), f"{backend}, parameter {index}: {found}, expected {wanted}"

    @rule(
        grads=st.lists(st.one_of(st.none(), GRADS), min_size=1, max_size=3),
        layout=st.sampled_from(["plain", "transposed", "negated", "expanded"]),
        repeat=st.integers(1, 3),
    )
    def step(self, grads: list[float | None], layout: str, repeat: int) -> None:
        for _ in range(repeat):
            self.set_grads(grads, layout)
            expected = self.expect_step()
            for world in self.each():
                world.optimizer.step()
            self.compare(expected)

    def then_step(self, grad: float | None) -> None:
        if grad is None:
            return
        self.set_grads([grad], "plain")
        expected = self.expect_step()
        for world in self.each():
            world.optimizer.step()
        self.compare(expected)

    @rule(grad=GRADS, scale=st.sampled_from([1.0, 2.0, 0.5]), finite=st.booleans(), ours=st.booleans())
    def scaled_step(self, grad: float, scale: float, finite: bool, ours: bool) -> None:
        self.set_grads([grad if finite else float("inf")], "plain")
        expected = self.expect_step(1 / scale) if finite else [array(p) for p in self.worlds["cpu"].params]
        for index, (kept, param) in enumerate(zip(self.remembered, self.worlds["cpu"].params, strict=True)):
            if ours and not finite and index not in self.away:  # the step has made the states, and stopped then
                kept.make_states(array(param), self.kind, param.dtype == torch.bfloat16)
        for world in self.each():
            make: Any = fused_optim.GradScaler if ours else torch.amp.GradScaler
            scaler = make("cpu", init_scale=scale)
            scaler.scale(torch.ones(()))
            if all(index in self.away for index in range(len(world.params))):
                continue
            scaler.step(world.optimizer)
            scaler.update()
        if not all(index in self.away for index in range(len(self.remembered))):
            self.compare(expected)

    @rule(grad=GRADS)
    def refused_step(self, grad: float) -> None:
        """Nothing changes, whatever has been written before it."""
        self.set_grads([grad], "plain")
        before = [array(param) for param in self.worlds["cpu"].params]
        for world in self.each():
            last = [param for index, param in enumerate(world.params) if index not in self.away][-1:]
            for param in last:
                param.grad = torch.zeros(param.shape, dtype=param.dtype).to_sparse() if param.dim() else None
                if param.grad is not None:
                    with pytest.raises(RuntimeError, match="sparse"):
                        world.optimizer.step()
                param.grad = None
        self.compare(before)

    # Writes

    @rule(
        which=st.integers(0, 2),
        value=NUMBERS,
        door=st.sampled_from(["copy_", "data", "numpy", "new", "clamp"]),
        then=THEN,
    )
    def write(self, which: int, value: float, door: str, then: float | None) -> None:
        index = self.member(which)
        for world in self.each():
            param = world.params[index]
            with torch.no_grad():
                if door == "copy_":
                    param.copy_(torch.full_like(param, value))
                elif door == "data":
                    param.data.fill_(value)
                elif door == "numpy":
                    param.data.view(torch.int16 if param.dtype == torch.bfloat16 else torch.int32).numpy()[...] = 0
                elif door == "new":
                    param.data = torch.full_like(param, value)
                else:
                    param.clamp_(-abs(value), abs(value))
        self.then_step(then)

    @rule(which=st.integers(0, 2), value=NUMBERS, then=THEN)
    def write_one_element(self, which: int, value: float, then: float | None) -> None:
        for world in self.each():
            with torch.no_grad():
                world.params[self.member(which)].view(-1)[0] = value
        self.then_step(then)

    @rule(which=st.integers(0, 2), then=THEN)
    def write_what_is_there(self, which: int, then: float | None) -> None:
        for world in self.each():
            param = world.params[self.member(which)]
            with torch.no_grad():
                param.copy_(param.clone())
        self.then_step(then)

    @precondition(lambda self: self.swapped is None)
    @rule(value=NUMBERS, then=THEN)
    def swap_out(self, value: float, then: float | None) -> None:
        self.swapped = {}
        for backend, world in self.worlds.items():
            self.swapped[backend] = [param.detach().clone() for param in world.params]
            for param in world.params:
                param.data.fill_(value)
        self.then_step(then)

    @precondition(lambda self: self.swapped is not None)
    @rule(then=THEN)
    def swap_back(self, then: float | None) -> None:
        for backend, world in self.worlds.items():
            assert self.swapped is not None
            for param, value in zip(world.params, self.swapped[backend], strict=True):
                param.data.copy_(value)
        self.swapped = None
        self.then_step(then)

    @rule(which=st.integers(0, 2), narrow=st.booleans(), then=THEN)
    def change_dtype(self, which: int, narrow: bool, then: float | None) -> None:
        index = self.member(which)
        for world in self.each():
            param = world.params[index]
            param.grad = None
            param.data = param.data.to(torch.bfloat16 if narrow else torch.float32)
        self.then_step(then)

    @rule(then=THEN)
    def refresh_masters(self, then: float | None) -> None:
        for world in self.each():
            world.optimizer.refresh_masters()
        for index, (kept, param) in enumerate(zip(self.remembered, self.worlds["cpu"].params, strict=True)):
            if kept.master is not None and param.dtype == torch.bfloat16 and index not in self.away:
                kept.master = array(param)
        self.then_step(then)

    # Groups, copies, checkpoints

    @rule(group=st.integers(0, 1), lr=st.sampled_from([0.5, 0.0, 1.0]), by=st.sampled_from(["group", "hook"]))
    def change_lr(self, group: int, lr: float, by: str) -> None:
        self.lrs[group] = lr
        for world in self.each():
            if by == "group":
                world.optimizer.param_groups[group]["lr"] = lr
                continue

            def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
                optimizer.param_groups[group]["lr"] = lr

            handle = world.optimizer.register_step_pre_hook(hook)
            for param in world.params:
                param.grad = None
            world.optimizer.step()
            handle.remove()

    @rule(which=st.integers(1, 2), then=THEN)
    def remove_or_add_back(self, which: int, then: float | None) -> None:
        index = self.member(which)
        if index == 0:
            return
        back = index in self.away
        self.away ^= {index}
        for world in self.each():
            params = world.optimizer.param_groups[1]["params"]
            if back:
                params.append(world.params[index])
            else:
                params[:] = [param for param in params if param is not world.params[index]]
        self.then_step(then)

    @rule(how=st.sampled_from(["copy", "pickle"]), then=THEN)
    def duplicate(self, how: str, then: float | None) -> None:
        for backend, world in self.worlds.items():
            for param in world.params:
                param.grad = None
            both = (world.params, world.optimizer)
            params, optimizer = copy.deepcopy(both) if how == "copy" else pickle.loads(pickle.dumps(both))
            self.worlds[backend] = World(params, optimizer)
        self.then_step(then)

    @precondition(lambda self: not self.away)
    @rule(into=st.sampled_from(["itself", "another"]), model_first=st.booleans(), then=THEN)
    def checkpoint(self, into: str, model_first: bool, then: float | None) -> None:
        for backend, world in self.worlds.items():
            saved = pickle.loads(pickle.dumps(world.optimizer.state_dict()))
            if into == "itself":
                world.optimizer.load_state_dict(saved)
                continue
            values = [param.detach().clone() for param in world.params]
            params = [Parameter(value.clone() if model_first else torch.ones_like(value)) for value in values]
            groups: list[list[Parameter]] = [[], []]
            by_id = dict(zip(map(id, world.params), params, strict=True))
            for mine, group in zip(groups, world.optimizer.param_groups, strict=True):
                mine += [by_id[id(param)] for param in group["params"]]
            optimizer = self.make(backend, groups)
            optimizer.load_state_dict(saved)
            for param, value in zip(params, values, strict=True):
                param.data.copy_(value)
            self.worlds[backend] = World(params, optimizer)
        self.then_step(then)

    @invariant()
    def steps_are_counted(self) -> None:
        for world in getattr(self, "worlds", {}).values():
            for kept, param in zip(self.remembered, world.params, strict=True):
                found = world.optimizer.state.get(param, {}).get("step")
                assert (0 if found is None else float(found)) == kept.step


def search(backends: tuple[str, ...], examples: int) -> None:
    class Search(Actions):
        pass

    Search.backends = backends
    log = logging.getLogger("fused_optim")
    level = log.level
    log.setLevel(logging.ERROR)  # pytest would keep every line of every example
    try:
        run_state_machine_as_test(
            Search, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None)
        )
    finally:
        log.setLevel(level)


@pytest.mark.interpreted
def test_actions_in_any_order() -> None:
    search(("cpu", "eager", "triton"), 25)


def test_actions_in_any_order_without_kernels_in_python() -> None:
    search(("cpu", "eager"), 150)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_actions_in_any_order() -> None:
    search(("cpu", "eager"), 5000)


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.timeout(3600)
def test_many_actions_in_any_order_in_the_interpreter() -> None:
    search(("cpu", "eager", "triton"), 500)
