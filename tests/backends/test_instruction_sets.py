"""One result whatever executes it: every instruction set, every number of threads, a forked child, a processor that
flushes denormals."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    SHAPES,
    Case,
    assert_same_results,
    assert_same_snapshots,
    bits,
    each_adam,
    each_adam_variant,
    each_dtype,
    each_kind,
    new_grad,
    new_params,
    set_grads,
    snapshot,
    train,
)
from support.sources import ROOT
from torch import Tensor
from torch.nn import Parameter

import fused_optim
from fused_optim.backends import extension

pytestmark = pytest.mark.usefixtures("all_native")

BUILT = extension._C.build_info()["cpu_capabilities"].split(",") if extension._C is not None else []
# Two tensors beyond one thread's task of 128 K elements, with an odd rest, and small ones between them.
LARGE = [(300_007,), (5,), (131, 1000), (), (64, 64), (7, 20_011)]


def runs_here(capability: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    needed = {"default": [], "avx2": ["avx2", "f16c"], "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"]}
    return all(f" {flag} " in flags.replace("\n", " ") for flag in needed[capability])


CAPABILITIES = [capability for capability in BUILT if runs_here(capability)]


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return functools.partial(monkeypatch.setenv, "FUSED_OPTIM_CPU_CAPABILITY")


def run(case: Case, variant: str, dtype: torch.dtype, shapes: Any = SHAPES, steps: int = 3, **options: Any) -> Any:
    params = new_params(dtype, shapes)
    optimizer = case.make(params, variant, backend="cpu", **options)
    train(optimizer, params, steps)
    return optimizer


# Instruction sets -----------------------------------------------------------------------------------------------


def test_every_instruction_set_is_built() -> None:
    expected = ["default", "avx2", "avx512"] if platform.machine() == "x86_64" else ["default"]
    assert expected == BUILT
    assert "default" in CAPABILITIES


@each_dtype
@each_adam_variant
def test_instruction_sets_give_the_same_bits(
    case: Case, variant: str, dtype: torch.dtype, capability: Callable[[str], None]
) -> None:
    results = []
    for name in CAPABILITIES:
        capability(name)
        assert extension._C is not None
        assert extension._C.cpu_capability() == name
        results.append(run(case, variant, dtype))
    for other in results[1:]:
        assert_same_results(results[0], other)


@each_kind
@each_dtype
def test_instruction_sets_and_threads_draw_alike(
    case: Case, dtype: torch.dtype, capability: Callable[[str], None], threads: Callable[[int], None]
) -> None:
    """Codes and random words, in rows of several tasks and such that share one."""
    shapes = ((64, 96), (31, 32), (200, 33), (512, 800), (300_001,))
    options: dict[str, Any] = {"state_dtype": "8bit", "rounding": "stochastic", "seed": 9}
    if dtype == torch.bfloat16:
        options["master_weights"] = "split8"
    results = []
    for name in CAPABILITIES:
        for count in (1, 3):
            capability(name)
            threads(count)
            results.append(run(case, "default", dtype, shapes, 2, **options))
    for other in results[1:]:
        assert_same_results(results[0], other)


def every_code(finite: bool) -> dict[str, Tensor]:
    """Adam's states in codes: each code with each exponent of its kind, mixed within a row of each exponent.

    finite: the codes of what is not have their neighbour's place.
    """
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    if finite:
        order[(order == 128) | (order == 255)] -= 1
    state = {"step": torch.tensor(3.0)}
    kinds = {"exp_avg": (torch.int8, range(15, 254)), "exp_avg_sq": (torch.uint8, range(76, 191))}
    for name, (dtype, exponents) in kinds.items():
        found = torch.tensor([*exponents, 0], dtype=torch.uint8).repeat(3)[:240]
        state[name] = order.to(dtype).repeat(240, 1)
        state[f"{name}_scale"] = found.view(240, 1).repeat(1, 8)
    return state


@pytest.mark.parametrize("finite", [True, False], ids=["finite codes", "all codes"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25], ids=["no decay", "coupled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets_agree_on_every_code(
    dtype: torch.dtype, weight_decay: float, finite: bool, capability: Callable[[str], None]
) -> None:
    """What is not finite, zeros and subnormals among codes and gradients; in groups of all such, and beside others."""
    options: dict[str, Any] = {"state_dtype": "8bit", "lr": 0.5, "weight_decay": weight_decay, "seed": 4}
    if dtype == torch.bfloat16:
        options["master_weights"] = "split8"
    generator = torch.Generator().manual_seed(0)
    grad, start = (
        torch.randn(240, 256, generator=generator) * torch.exp2(-30 * torch.rand(240, 256, generator=generator))
        for _ in range(2)
    )
    grad[9::10], start[9::10] = 0, 0  # where averages of 0 stay such
    # The root of an average of 5e20's squares exceeds the largest power of two that a group may have.
    for row, odd in enumerate((0.0, -0.0, 1e-42, 5e20, math.inf, -math.inf, math.nan, 3e38)):
        grad[row::10] = torch.where(torch.rand(256, generator=generator) < 0.02, odd, grad[row::10])
        grad[row::10, :32] = odd
    results = []
    for name in (*CAPABILITIES, None):
        if name is not None:
            capability(name)
        param = Parameter(start.to(dtype, copy=True))
        optimizer = fused_optim.Adam([param], backend="eager" if name is None else "cpu", **options)
        optimizer.state[param] = every_code(finite)
        if dtype == torch.bfloat16:
            remainders = torch.arange(240 * 256, dtype=torch.int32).to(torch.int8).view(240, 256)
            optimizer.state[param]["param_remainder"] = remainders
        param.grad = grad.to(dtype)
        optimizer.step()
        results.append(snapshot(optimizer))
    codes = results[0][0]["exp_avg"], results[0][0]["exp_avg_sq"]
    assert not [code for code in (-128, 0, 127) if not (codes[0] == code).any()]
    assert not [code for code in (0, 4, 254, 255) if not (codes[1] == code).any()]
    for other in results[1:]:
        assert_same_snapshots(results[0], other)


@each_adam
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_instruction_sets_agree_on_wide_states(
    case: Case, dtype: torch.dtype, capability: Callable[[str], None]
) -> None:
    results = []
    for name in CAPABILITIES:
        capability(name)
        results.append(run(case, "all", dtype, state_dtype=torch.float32))
    for other in results[1:]:
        assert_same_results(results[0], other)


@each_adam
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("column", ["param", "grad", "exp_avg", "exp_avg_sq"])
def test_instruction_sets_agree_on_every_16_bit_number(
    case: Case, column: str, dtype: torch.dtype, capability: Callable[[str], None]
) -> None:
    """All 65,536 bit patterns in one column, NaN payloads, infinities and subnormals among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    results = []
    for name in (*CAPABILITIES, None):
        if name is not None:
            capability(name)
        param = Parameter(every.clone() if column == "param" else torch.ones_like(every))
        optimizer = case.make([param], backend="eager" if name is None else "cpu", lr=0.5)
        optimizer.state[param] = {
            "step": torch.tensor(3.0),
            "exp_avg": every.clone() if column == "exp_avg" else torch.zeros_like(every),
            "exp_avg_sq": every.clone() if column == "exp_avg_sq" else torch.ones_like(every),
        }
        param.grad = every.clone() if column == "grad" else torch.full_like(every, 0.5)
        optimizer.step()
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_same_snapshots(results[0], other)


@each_adam
def test_unknown_instruction_set_is_refused(case: Case, capability: Callable[[str], None]) -> None:
    capability("sse9")
    params = new_params()
    optimizer = case.make(params, backend="cpu")
    set_grads(params, 0)
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"FUSED_OPTIM_CPU_CAPABILITY=sse9.*default"):
        optimizer.step()
    assert all(torch.equal(bits(param), bits(old)) for param, old in zip(params, before, strict=True))


@each_adam
def test_empty_variable_is_no_choice(case: Case, capability: Callable[[str], None]) -> None:
    capability("")
    run(case, "default", torch.float32)
    assert extension._C is not None
    assert extension._C.cpu_capability() == CAPABILITIES[-1]


# Threads --------------------------------------------------------------------------------------------------------


@each_adam
@each_dtype
def test_thread_count_does_not_matter(case: Case, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(run(case, "all", dtype, LARGE, steps=2))
    for other in results[1:]:
        assert_same_results(results[0], other)


@each_adam
def test_threaded_step_is_the_witnesss(case: Case, threads: Callable[[int], None]) -> None:
    threads(3)
    one = run(case, "all", torch.float32, LARGE, steps=2)
    params = new_params(torch.float32, LARGE)
    witness = case.make(params, "all", backend="eager")
    train(witness, params, 2)
    assert_same_results(one, witness)


THREADS_OF_A_STEP = """
import os, torch, fused_optim
torch.set_num_threads(1)
param = torch.nn.Parameter(torch.ones(2_000_000))
param.grad = torch.ones(2_000_000)
optimizer = fused_optim.AdamW([param], backend="cpu")
for count in (1, 3):
    torch.set_num_threads(1)
    moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": torch.tensor(0.0), **moments}
    torch.set_num_threads(count)
    before = len(os.listdir("/proc/self/task"))
    optimizer.step()
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.program
def test_number_of_threads_is_torchs() -> None:
    """set_num_threads(1) means no second thread, whatever the machine has; the workers stay for torch to use."""
    command = [sys.executable, "-c", THREADS_OF_A_STEP]
    assert subprocess.check_output(command, text=True, cwd=ROOT).split() == ["0", "2"]


def digest(optimizer: Any) -> bytes:
    total = hashlib.sha256()
    for entry in snapshot(optimizer):
        for value in entry.values():
            total.update(bits(value).numpy().tobytes())
    return total.digest()


def in_child(job: Callable[[], bytes], seconds: int = 30) -> bytes:
    """What `job` returns in a forked child; fails where the child hangs or dies."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)  # a hang ends the child
            os.write(write, job())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return result


# Together many elements, each few: in a forked child torch's own operations hang beyond 32 K elements.
MANY = [(30_000,)] * 10


def train_threaded(optimizer: Any, params: list[Parameter], steps: int, threads: int) -> bytes:
    """Train, with several threads during the step alone."""
    for step in range(steps):
        set_grads(params, step)
        torch.set_num_threads(threads)
        optimizer.step()
        torch.set_num_threads(1)
    return digest(optimizer)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@each_adam
@pytest.mark.parametrize("parent_used_threads", [False, True])
def test_forked_child_may_step(case: Case, parent_used_threads: bool, threads: Callable[[int], None]) -> None:
    """A pool's workers do not exist in the child; waiting for them would be for ever."""
    threads(3)
    if parent_used_threads:
        run(case, "all", torch.float32, LARGE, steps=2)
        torch.ones(2_000_000).add_(1)
    threads(1)

    def job() -> bytes:
        params = new_params(torch.float32, MANY)
        return train_threaded(case.make(params, "all", backend="cpu"), params, 2, threads=3)

    from_child = in_child(job)
    assert from_child == job()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@each_adam
def test_optimizer_that_stepped_goes_on_in_the_child(case: Case, threads: Callable[[int], None]) -> None:
    threads(3)
    params = new_params(torch.float32, LARGE)
    optimizer = case.make(params, "all", backend="cpu")
    train(optimizer, params, 2)
    torch.ones(2_000_000).add_(1)
    threads(1)

    def job() -> bytes:
        return train_threaded(optimizer, params, 2, threads=3)

    from_child = in_child(job)
    assert from_child == job()


# Denormals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flush_denormal() -> Iterator[Callable[[bool], bool]]:
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@each_adam
@pytest.mark.parametrize("flush", [False, True])
def test_denormals_are_as_the_caller_has_them_in_every_thread(
    case: Case, flush: bool, flush_denormal: Callable[[bool], bool], threads: Callable[[int], None]
) -> None:
    """torch.set_flush_denormal sets a register of the calling thread; the workers take it over."""
    results = []
    for count in (1, 2, 4):
        threads(count)
        param = Parameter(torch.ones(600_000))
        grad = torch.full_like(param, 1e-20)  # its square is denormal, and so is a tenth of 1e-38
        first = torch.full_like(param, 1e-38)
        optimizer = case.make([param], backend="cpu")
        optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": torch.zeros_like(param)}
        param.grad = grad
        assert flush_denormal(flush)
        optimizer.step()
        flush_denormal(False)
        second = optimizer.state[param]["exp_avg_sq"]
        assert bool((second == 0).all()) is flush
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_same_snapshots(results[0], other)


@each_adam
def test_register_of_the_workers_is_restored(
    case: Case, flush_denormal: Callable[[bool], bool], threads: Callable[[int], None]
) -> None:
    """torch's own workers must not go on flushing after a step that did."""
    threads(4)
    denormal = torch.full((2_000_000,), 1e-39)
    assert (denormal * 1.0 != 0).all()
    param = Parameter(torch.ones(2_000_000))
    optimizer = case.make([param], backend="cpu")
    param.grad = new_grad(param, 0)
    assert flush_denormal(True)
    optimizer.step()
    flush_denormal(False)
    assert (denormal * 1.0 != 0).all()


# Number formats -------------------------------------------------------------------------------------------------


def compile_storage_test(tmp_path: Path, flags: list[str], include: Path = ROOT / "csrc") -> Path:
    program = tmp_path / "storage_test"
    options = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
    source = str(ROOT / "tests" / "csrc" / "storage_test.cpp")
    subprocess.run(["c++", *options, *flags, source, "-o", str(program)], check=True)
    return program


CONVERSION_FLAGS = {"default": [], "avx2": ["-mavx2", "-mf16c"]}


@pytest.mark.requires("c++")
@pytest.mark.parametrize("capability_flags", [name for name in CONVERSION_FLAGS if name in CAPABILITIES])
def test_number_formats_are_converted_right(tmp_path: Path, capability_flags: str) -> None:
    program = compile_storage_test(tmp_path, CONVERSION_FLAGS[capability_flags])
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.requires("c++")
def test_every_float_is_rounded_right(tmp_path: Path) -> None:
    program = compile_storage_test(tmp_path, ["-O3"])
    result = subprocess.run([program, "all"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.requires("c++")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
        ("0xfffu + ((magnitude >> 13) & 1u)", "0x1000u"),
        ("0x47800000u", "0x47900000u"),
        ("0x38800000u) - float_of(0x38800000u)", "0x38000000u) - float_of(0x38000000u)"),
        ("(whole & 0x7fffffffu) > 0x7f800000u ? upper : whole", "whole"),
        ("rounds_to(param, master) ? master", "rounds_to(param, master) || param.bits > 9 ? master"),
    ],
    ids=[
        "bfloat16 ties away",
        "float16 ties away",
        "float16 overflow",
        "float16 subnormals",
        "remainders that make NaNs",
        "masters of other numbers",
    ],
)
def test_wrong_conversion_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    text = (ROOT / "csrc" / "storage.h").read_text()
    assert right in text
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "rules").symlink_to(ROOT / "csrc" / "rules")
    (source / "row.h").symlink_to(ROOT / "csrc" / "row.h")
    (source / "storage.h").write_text(text.replace(right, wrong))
    program = compile_storage_test(tmp_path, [], include=source)
    assert subprocess.run([program], capture_output=True).returncode != 0


def test_bits_of_a_tensor_are_compared() -> None:
    """The comparison that every test relies on tells -0.0 from 0.0 and sees a single bit."""
    zero: Tensor = torch.tensor([0.0])
    assert not torch.equal(bits(zero), bits(-zero))
    assert not torch.equal(bits(torch.tensor([1.0])), bits(torch.nextafter(torch.tensor([1.0]), zero)))
