"""What Triton's compiler makes of the kernels: a program of test_triton_offline.py, whose process interprets them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from fused_optim.bench.offline import Driver, compiled, pretend
from torch.nn import Parameter

# What the tests ask for -------------------------------------------------------------------------------------------

# Accesses of 16 bytes; of AMD's, four or two registers of 4 or 8 bytes.
WIDE_LOADS = {"cuda": r"ld\.global\S*\.v[248]\.\S+", "hip": r"(?:global|buffer|flat)_load_dwordx4"}
WIDE_STORES = {"cuda": r"st\.global\S*\.v[248]\.\S+", "hip": r"(?:global|buffer|flat)_store_dwordx4"}
# Roots and divisions that are not IEEE's, and a product and sum that are rounded once.
INEXACT = r"\b(?:sqrt\.approx|div\.full|div\.approx|rsqrt|fma\.rn\.f32|fma\.rn\.f32x2)\S*"


def spilled_bytes(kernel: Any) -> int:
    """What a kernel's threads keep in memory for want of registers."""
    if "cubin" not in kernel.asm:
        return sum(int(count) for count in re.findall(r"\.(?:vgpr|sgpr)_spill_count: *(\d+)", kernel.asm["amdgcn"]))
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        report = subprocess.run(command, text=True, check=True, capture_output=True).stdout
    ((stack, local),) = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    return int(stack) + int(local)


def width(access: str) -> int:
    """Bytes of an access as PTX writes it; AMD's are of 16 bytes by their names."""
    found = re.search(r"\.v(\d)\.[a-z](\d+)", access)
    return int(found[1]) * int(found[2]) // 8 if found else 16


def facts(kernel: Any) -> dict[str, Any]:
    """What is to be known of a compiled kernel, and which columns of the tensors it walks."""
    name, backend = kernel.metadata.name, kernel.metadata.target.backend
    assembly = kernel.asm["ptx" if backend == "cuda" else "amdgcn"]
    wide_loads, wide_stores = (
        len([access for access in re.findall(pattern[backend], assembly) if width(access) == 16])
        for pattern in (WIDE_LOADS, WIDE_STORES)
    )
    read, written = columns_of(kernel)
    inexact = INEXACT if name == "prepare_kernel" else INEXACT + r"|\bfma\.\S*"  # a logarithm's own
    return {
        "name": name,
        "wide_loads": wide_loads,
        "wide_stores": wide_stores,
        "columns_read": read,
        "columns_written": written,
        "inexact": sorted(set(re.findall(inexact, assembly))) if backend == "cuda" else [],
        "spilled": spilled_bytes(kernel),
    }


def columns_of(kernel: Any) -> tuple[int, int]:
    """How many columns a kernel reads and writes, but for those of bytes, of which a thread has 8."""
    name, names = kernel.metadata.name, kernel.src.fn.arg_names
    if "DTYPES" not in names:
        return 0, 0
    _, _, master, *states = kernel.src.constants[(names.index("DTYPES"),)]
    states = [dtype for dtype in states if dtype not in (6, 7)]
    param_read = 2 if master == 5 else 1  # a remainder is half of a number
    param_written = 2 if master and master != 6 else 1
    return {
        "reduce_kernel": (1, 0),
        "apply_kernel": (1 + param_read + len(states), param_written + len(states)),
        "accumulate_kernel": (1 + param_read + len(states), len(states)),
        "move_kernel": (param_read + len(states), param_written),
    }[name]


def all_facts() -> list[dict[str, Any]]:
    """Of every kernel of this process."""
    from fused_optim.kernels import apply, prepare, reduce

    kernels = (reduce.reduce_kernel, reduce.total_kernel, prepare.prepare_kernel, prepare.direction_kernel)
    kernels += (prepare.grad_sq_kernel, apply.apply_kernel, apply.accumulate_kernel, apply.move_kernel)
    return [facts(one) for kernel in kernels for one in compiled(kernel)]


SHAPES = ((5,), (1025,), (33 * 1024 + 5,), (129, 64))  # the last one's states may be codes


def step(optimizer: Any) -> None:
    from cases import inner

    for group in inner(optimizer).param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def compile_rules() -> None:
    from cases import RULES, inner

    for make in RULES.values():
        optimizer = make([Parameter(torch.ones(n)) for n in SHAPES], backend="triton")
        step(optimizer)
        # What only a caller that waits launches.
        ((_, _, phases),) = inner(optimizer).plan.native._devices
        phases.reduce(phases_step())


def phases_step() -> Any:
    from fused_optim.options.clip import GLOBAL_NORM, ClipOptions
    from fused_optim.plan.step import DeviceStep, Step

    return Step(1.0, 1, ClipOptions(GLOBAL_NORM, 1.0), False, [DeviceStep(0)], None)


def compile_storages(target: str) -> None:
    from fused_optim import LAMB, AdamW, ClipGradByGlobalNorm

    settings = [
        (torch.float64, {}),
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"state_dtype": torch.float32}),
        (torch.float16, {"state_dtype": torch.float32}),
        (torch.bfloat16, {"master_weights": "float32"}),
        (torch.float16, {"master_weights": "float32"}),
        (torch.bfloat16, {"master_weights": "split"}),
        (torch.float32, {"state_dtype": "8bit"}),
        (torch.bfloat16, {"state_dtype": "8bit", "master_weights": "split8"}),
        (torch.bfloat16, {"state_dtype": "8bit", "rounding": "stochastic"}),
        (torch.float16, {"rounding": "stochastic"}),
        # What AMD's compiler keeps of them in registers cannot be asked for.
        *([] if target.startswith("gfx") else [(torch.float64, {"state_dtype": "8bit"})]),
    ]
    for dtype, options in settings:
        for make in (AdamW, LAMB):
            clip = {} if make is LAMB else {"grad_clip": ClipGradByGlobalNorm(1.0)}
            params = [Parameter(torch.ones(n, dtype=dtype)) for n in SHAPES]
            step(make(params, backend="triton", **options, **clip))


def run_schedule(active: Driver) -> dict[str, int]:
    """How many kernels have been compiled after each part."""
    from fused_optim import AdamW, ClipGradByGlobalNorm

    counts = {}
    optimizer = AdamW([Parameter(torch.ones(n)) for n in SHAPES], backend="triton")
    step(optimizer)
    counts["first step"] = len(active.loaded)
    for index in range(100):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + index)
        step(optimizer)
        if index % 10 == 0:
            optimizer.param_groups[0]["params"][index % 3].grad = None
            optimizer.step()
    counts["100 steps"] = len(active.loaded)
    for numel, count, groups in ((16, 1, 1), (16, 16, 1), (7, 33, 3), (2048, 128, 128)):
        params = [Parameter(torch.ones(numel)) for _ in range(count)]
        step(AdamW([{"params": params[i::groups]} for i in range(groups)], backend="triton"))
    counts["other numbers of tensors and groups"] = len(active.loaded)
    step(AdamW([Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in SHAPES], backend="triton"))
    counts["another dtype"] = len(active.loaded)
    params = [Parameter(torch.ones(n)) for n in SHAPES]
    step(AdamW(params, backend="triton", grad_clip=ClipGradByGlobalNorm(1.0)))
    counts["a clip"] = len(active.loaded)
    counts["launched"] = active.launched
    return counts


def main(task: str, target: str) -> None:
    active = pretend(target)
    if task == "schedule":
        print(json.dumps(run_schedule(active)))
        return
    compile_rules() if task == "rules" else compile_storages(target)
    print(json.dumps(all_facts()))


if __name__ == "__main__":
    main(*sys.argv[1:])
