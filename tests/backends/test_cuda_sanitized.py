"""The CUDA phases on the processor once more, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host.build import compile_module
from support.sources import ROOT

HERE = Path(__file__).resolve().parent


def library(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], text=True, check=True, stdout=subprocess.PIPE
    ).stdout.strip()


@pytest.mark.slow
@pytest.mark.requires("g++")
@pytest.mark.timeout(1800)
def test_the_cuda_phases_under_sanitizers() -> None:
    compile_module(ROOT / "build" / "cuda_on_host", sanitize=True)  # now: the preloaded library slows the compiler
    # Preloaded, because Python itself is not built with them; what Python leaks at its end is not looked at.
    environment = {
        **os.environ,
        "CUDA_ON_HOST_SANITIZED": "1",
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not gpu and not interpreted"]
    command += [str(HERE / name) for name in ("test_cuda_on_host.py", "test_phases.py")]
    result = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-8000:]
    assert " passed" in result.stdout, result.stdout[-2000:]
