"""Builds the extension with CMake and Ninja; everything that is static stands in pyproject.toml.

Without a C++ compiler the package is installed as pure Python. Any other failure fails the build.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# What decides how CMake configures a build folder for good: when one of these changes, the folder is emptied.
CMAKE_ENVIRONMENT = (
    "CC",
    "CXX",
    "CUDACXX",
    "CUDAHOSTCXX",
    "CXXFLAGS",
    "CUDAFLAGS",
    "LDFLAGS",
    "CMAKE_PREFIX_PATH",
)


def find_cxx_compiler() -> str | None:
    """The C++ compiler that CMake will use: CXX where it is set, else the first usual name on PATH."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return shutil.which(named[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_build_tool(name: str) -> str:
    """cmake or ninja: on PATH, or the one installed with pip, whose folder need not be on PATH."""
    scripts = Path(sys.executable).parent
    found = shutil.which(name, path=str(scripts)) or shutil.which(name)
    if found is None:
        try:
            module = __import__(name)
        except ImportError:
            raise SystemExit(f"fused_optim's build needs {name}: pip install {name}") from None
        folder = module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR
        found = shutil.which(name, path=folder)
    if found is None:
        raise SystemExit(f"fused_optim's build found the package {name}, but no program in it")
    return found


class FreshBuild(build_py):
    """build_py into an empty folder: a module that an earlier build left there would reach the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """build_ext by CMake. An editable install keeps its build folder and compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if self.editable_mode:
            folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        else:
            folder = Path(self.build_temp).resolve() / "cmake"
        configure = [
            find_build_tool("cmake"),
            *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_build_tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFUSED_OPTIM_VERSION={self.distribution.get_version()}",
            f"-DFUSED_OPTIM_CUDA={os.environ.get('FUSED_OPTIM_CUDA') or 'AUTO'}",
            f"-DFUSED_OPTIM_CUDA_ARCHS={os.environ.get('FUSED_OPTIM_CUDA_ARCHS', '')}",
        ]
        environment = [f"{name}={os.environ.get(name, '')}" for name in CMAKE_ENVIRONMENT]
        fingerprint = "\n".join([find_cxx_compiler() or "", *configure, *environment])
        record = folder / "configured_by.txt"
        if not record.exists() or record.read_text() != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
        self.run_tool(configure)
        record.write_text(fingerprint)

        jobs = os.environ.get("MAX_JOBS")
        self.run_tool([configure[0], "--build", str(folder), *(("--parallel", jobs) if jobs else ())])
        self.mkpath(str(target.parent))
        self.copy_file(str(folder / target.name), str(target))

    def run_tool(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"fused_optim's extension was not built: {command[0]} failed") from error


extensions = [Extension("fused_optim._C", sources=[])]
if find_cxx_compiler() is None:
    print("warning: no C++ compiler was found (CXX, c++, g++, clang++): installing pure Python", file=sys.stderr)
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild})
