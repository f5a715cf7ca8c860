"""Builds the extension with the CUDA phases compiled by the host's compiler, and loads it beside the real one."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
from support.sources import CPP, ROOT, sources

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CAPABILITIES = {
    "default": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
# A namespace of its own: pybind11 knows the real extension's classes by their C++ names.
COMMON = [
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-Dfused_optim=fused_optim_on_host", "-DFO_WITH_CUDA", "-DFO_MOST_PIECES=8"),
    *(f"-I{HERE}", f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]


def compile_module(folder: Path, *, sanitize: bool, csrc: Path = CSRC) -> Path:
    """Compile what has changed since the last time, and link it: objects and module are named after their contents."""
    flags = [*COMMON, "-O1", *(SANITIZE if sanitize else [])]
    flags = [flag.replace(str(CSRC), str(csrc)) for flag in flags]
    files = [*sources(csrc.name, *CPP, at_least=43, root=csrc.parent), *sorted(HERE.glob("*.h")), HERE / "shim.cpp"]
    headers = digest_of(*flags, *(file.read_bytes() for file in files if file.suffix == ".h"))
    kernels = csrc / "cpu" / "kernels.cpp"
    units = [(file, file.stem, []) for file in files if file.suffix != ".h" and file != kernels]
    capabilities = CAPABILITIES if os.uname().machine == "x86_64" else {"default": []}
    units += [(kernels, name, [*extra, f"-DFO_CPU_CAPABILITY={name}"]) for name, extra in capabilities.items()]
    folder = folder / f"{sysconfig.get_config_var('SOABI')}{'-sanitized' if sanitize else ''}"

    def compile_unit(unit: tuple[Path, str, list[str]]) -> Path:
        source, name, extra = unit
        out = folder / f"{name}-{digest_of(headers, str(source), *extra, source.read_bytes())}.o"
        if not out.exists():
            run(["g++", *flags, *extra, "-x", "c++", "-c", str(source), "-o", f"{out}.partial"])
            Path(f"{out}.partial").rename(out)
        return out

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # another worker of the same run may be compiling it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(map(str, pool.map(compile_unit, units)))
        module = folder / f"_C-{digest_of(*objects)}.so"
        if not module.exists():
            link = ["g++", "-shared", *(SANITIZE if sanitize else []), *objects, "-o", f"{module}.partial"]
            run([*link, "-ldl", "-pthread"])
            Path(f"{module}.partial").rename(module)
            for file in folder.iterdir():  # of sources that are no longer
                if file.suffix in (".o", ".so") and str(file) not in (*objects, str(module)):
                    file.unlink()
    return module


def digest_of(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def run(command: list[str]) -> None:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}")


class OnHost:
    """The loaded extension and the shim's own functions."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("cuda_on_host._C", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._shim = ctypes.CDLL(str(path))

    def schedule(self, order: str, seed: int = 0) -> None:
        self._shim.cuda_on_host_schedule(("ascending", "descending", "random").index(order), seed)

    def launches(self) -> list[tuple[int, int, int, int]]:
        """Blocks, threads, bytes loaded and stored of every launch since the last call."""
        room = 4096
        facts = (ctypes.c_uint64 * 4 * room)()
        count = self._shim.cuda_on_host_launches(facts, room)
        assert count <= room
        return [tuple(facts[i]) for i in range(count)]

    def fail_launch(self, after: int) -> None:
        self._shim.cuda_on_host_fail_launch(after)

    def set_device(self, *, devices: int = 2, driver: int = 13000, has_kernels: bool = True, error: int = 209) -> None:
        """has_kernels=False: asking for one gives the error, by default cudaErrorNoKernelImageForDevice."""
        self._shim.cuda_on_host_device(devices, driver, 0 if has_kernels else error)

    def forget_contexts(self) -> None:
        gc.collect()  # a plan of an earlier test would make one anew when it goes
        self._shim.cuda_on_host_forget_contexts()

    def contexts(self) -> int:
        """A bit for each device that has a context; -1 if one is current."""
        return int(self._shim.cuda_on_host_contexts())

    def largest_parameters(self) -> int:
        """The bytes of parameters of the launch that had most, since the last call."""
        return int(self._shim.cuda_on_host_largest_parameters())

    def copies(self) -> int:
        """The copies between host and device since the last call."""
        return int(self._shim.cuda_on_host_copies())

    def waits(self) -> int:
        """The calls that wait for torch's stream, or that may, since the last call."""
        return int(self._shim.cuda_on_host_waits())

    def driver_is_gone(self, gone: bool) -> int:
        """As in a process that ends. How many calls there have been since to a driver that was gone."""
        return int(self._shim.cuda_on_host_driver_is_gone(gone))

    def refuse_allocations(self, count: int) -> None:
        self._shim.cuda_on_host_refuse_allocations(count)

    def allocated(self) -> int:
        """The blocks of memory that are allocated now; those of plans that nobody has any more are gone."""
        gc.collect()
        return int(self._shim.cuda_on_host_allocated())

    def destroy(self, graph: int) -> None:
        self._shim.cuda_on_host_destroy_graph(graph)

    def begin_capture(self) -> None:
        self._shim.cuda_on_host_begin_capture()

    def end_capture(self) -> int:
        return int(self._shim.cuda_on_host_end_capture())

    def replay(self, graph: int) -> None:
        assert self._shim.cuda_on_host_replay(graph) == 0
