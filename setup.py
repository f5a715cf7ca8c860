"""Builds the extension with CMake and Ninja; everything that is static stands in pyproject.toml.

FUSED_OPTIM_EXTENSION says whether: AUTO, the default, installs pure Python where there is no C++ compiler; ON fails
there; OFF installs pure Python anyway. Any other failure fails the build.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
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
        found = shutil.which(named[0])
        if found is None:
            raise SystemExit(f"CXX={os.environ['CXX']!r} names no program; name a C++ compiler, or unset CXX")
        return found
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def why_no_extension() -> str | None:
    """Why the package is built as pure Python; None where the extension is built."""
    wanted = os.environ.get("FUSED_OPTIM_EXTENSION") or "AUTO"
    if wanted not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"FUSED_OPTIM_EXTENSION is AUTO, ON or OFF; got {wanted!r}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise SystemExit(
            "fused_optim is not made for free-threaded CPython, whose objects have no interpreter lock; "
            "use the Python of the same version that has the lock (without t in its name)"
        )
    if wanted == "OFF":
        return "FUSED_OPTIM_EXTENSION=OFF was set"
    if find_cxx_compiler() is None:
        why = "no C++ compiler was found (c++, g++, clang++, or what CXX names)"
        if wanted == "ON":
            raise SystemExit(f"FUSED_OPTIM_EXTENSION=ON, but {why}; {packages('g++', 'gcc-c++')}")
        return why
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.exists():
        raise SystemExit(
            f"fused_optim's extension needs Python's headers, and there is no {headers}; "
            f"{packages('python3-dev', 'python3-devel')}, or build pure Python with FUSED_OPTIM_EXTENSION=OFF"
        )
    return None


def packages(debian: str, fedora: str) -> str:
    return f"apt install {debian} (Debian, Ubuntu) or dnf install {fedora} (Fedora, RHEL)"


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
        # Read by fused_optim/backends/extension.py.
        note = (ROOT if self.editable_mode else Path(self.build_lib)) / "fused_optim" / "_no_extension.txt"
        note.unlink(missing_ok=True)
        if WHY_NO_EXTENSION is not None:
            note.write_text(f"{WHY_NO_EXTENSION}\n", encoding="utf-8")


class CMakeBuild(build_ext):
    """build_ext by CMake. An editable install keeps its build folder and compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        shared = os.environ.get("FUSED_OPTIM_BUILD_FOLDER")
        if shared:
            folder = Path(shared).resolve()
        elif self.editable_mode:
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
        # A folder that FUSED_OPTIM_BUILD_FOLDER names serves one interpreter after another.
        of_python = ("-DPython_EXECUTABLE=", "-Dpybind11_DIR=") if shared else ()
        settings = [setting for setting in configure if not setting.startswith(of_python)]
        fingerprint = "\n".join([find_cxx_compiler() or "", *settings, *environment])
        record = folder / "configured_by.txt"
        if not record.exists() or record.read_text() != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
        # What CMake remembers of an interpreter is forgotten before it is told of this one.
        forget = ("-UPython_*", "-U_Python_*", "-UPYTHON_*") if shared else ()
        self.run_tool([configure[0], *forget, *configure[1:]])
        record.write_text(fingerprint)

        jobs = os.environ.get("MAX_JOBS")
        self.run_tool([configure[0], "--build", str(folder), *(("--parallel", jobs) if jobs else ())])
        self.mkpath(str(target.parent))
        self.copy_file(str(folder / target.name), str(target))

    def run_tool(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        # Off a terminal, as behind `pip install -v`, ninja says a line for each file that is done.
        environment = {"NINJA_STATUS": "[%f of %t, %e s] ", **os.environ}
        try:
            subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"fused_optim's extension was not built: {command[0]} failed") from error


WHY_NO_EXTENSION = why_no_extension()
if WHY_NO_EXTENSION is not None:
    print(f"warning: {WHY_NO_EXTENSION}: installing pure Python", file=sys.stderr)

setup(
    ext_modules=[] if WHY_NO_EXTENSION is not None else [Extension("fused_optim._C", sources=[])],
    cmdclass={"build_py": FreshBuild, "build_ext": CMakeBuild},
)
