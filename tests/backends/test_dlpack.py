"""csrc/plan/dlpack.h beside torch's own copy of the specification."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from support.sources import ROOT

INCLUDE = Path(torch.__file__).parent / "include"


def compile_comparison(header: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{header.parent.parent}", f"-I{INCLUDE}"]
    return subprocess.run(
        [*command, str(ROOT / "tests" / "csrc" / "dlpack_test.cpp")], capture_output=True, text=True, cwd=tmp_path
    )


@pytest.mark.requires("c++")
def test_every_size_and_offset_is_torchs(tmp_path: Path) -> None:
    result = compile_comparison(ROOT / "csrc" / "plan" / "dlpack.h", tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.requires("c++")
def test_another_order_of_fields_is_found(tmp_path: Path) -> None:
    text = (ROOT / "csrc" / "plan" / "dlpack.h").read_text()
    swapped = text.replace("  int64_t* shape;\n  int64_t* strides;", "  int64_t* strides;\n  int64_t* shape;")
    assert swapped != text
    header = tmp_path / "plan" / "dlpack.h"
    header.parent.mkdir()
    header.write_text(swapped)
    result = compile_comparison(header, tmp_path)
    assert result.returncode != 0
    assert "static assertion failed" in result.stderr


@pytest.mark.requires(torch="2.10")
def test_torchs_capsule_has_the_name_and_version_that_are_read() -> None:
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
    assert ctypes.c_uint32.from_address(address).value == 1
