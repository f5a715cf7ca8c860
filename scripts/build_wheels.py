"""Builds a wheel for each CPython that is at hand, links it for old systems, and checks it.

    python scripts/build_wheels.py                          CPython 3.10 to 3.14, where on PATH, in pyenv or /opt/python
    python scripts/build_wheels.py --python /path/python3   this one; may be repeated

The wheels are built from the sdist, which is thereby proved complete, and lie in dist/ beside it. The kernels are
compiled once for all interpreters, in build/wheels/cmake or the folder that FUSED_OPTIM_BUILD_FOLDER names.
FUSED_OPTIM_CUDA, FUSED_OPTIM_CUDA_ARCHS, CXX and CUDACXX are those of any build.

A module that is linked here asks for symbols of this machine's glibc, and most clusters have an older one. So the
linker is shown the libraries of glibc 2.28 instead, which the package ziglang writes: names and versions of symbols
without any code. libstdc++ is linked statically. Where the machine's own glibc is as old (the manylinux_2_28 image),
nothing of this is needed. auditwheel grades what came of it, read_wheel.py reads it and the interpreter loads it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "wheels"
MINORS = range(10, 15)
GLIBC = (2, 28)
MODULES = {"build": "build", "auditwheel": "auditwheel", "elftools": "pyelftools"}
PROGRAMS = ("cmake", "ninja", "patchelf")

# glibc 2.32 told libstdc++ whether there is one thread. Zero says that there may be more.
ABSENT = 'char __libc_single_threaded __attribute__((visibility("hidden"))) = 0;\n'
# One function of each library, so that all of them are written.
USER = """
#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
int user(double* x) { return dlsym(x, "x") != 0 && expm1(*x) > 0 && pthread_self() != 0; }
"""
QUESTION = """
import json, os, sys, sysconfig
print(json.dumps({
    "implementation": sys.implementation.name, "version": sys.version_info[:2], "executable": sys.executable,
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "headers": os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")),
}))
"""
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info())
"""


def ask(python: str) -> dict | None:
    """What an interpreter says of itself; None where it does not run, as a shim without a version behind it."""
    try:
        result = subprocess.run([python, "-c", QUESTION], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return json.loads(result.stdout) if result.returncode == 0 else None


def interpreters(named: list[str]) -> dict[tuple[int, int], str]:
    """One interpreter a minor version that can build; of the others it is said why they cannot."""
    candidates = list(named)
    if not named:
        candidates.append(sys.executable)
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        for minor in MINORS:
            candidates += filter(None, [shutil.which(f"python3.{minor}")])
            candidates += map(str, sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python")))
            candidates += map(str, Path("/opt/python").glob(f"cp3{minor}-cp3{minor}/bin/python"))
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        answer = ask(candidate)
        if answer is None:
            why = "does not run"
        elif answer["implementation"] != "cpython" or answer["free_threaded"]:
            why = "is free-threaded or no CPython, and there are no wheels for those"
        elif not answer["headers"]:
            why = "has no headers (Debian and Ubuntu: apt install python3-dev)"
        elif tuple(answer["version"]) not in {(3, minor) for minor in MINORS}:
            why = (
                f"is Python {'.'.join(map(str, answer['version']))}, and wheels are for 3.{MINORS[0]} to 3.{MINORS[-1]}"
            )
        else:
            found.setdefault(tuple(answer["version"]), answer["executable"])
            continue
        if named:
            raise SystemExit(f"{candidate} {why}")
        print(f"left out: {candidate} {why}")
    if not found:
        raise SystemExit("no CPython was found to build a wheel for; name one with --python")
    return dict(sorted(found.items()))


def old_glibc(folder: Path) -> list[str]:
    """The linker's options; empty where this machine's glibc is old enough."""
    if tuple(map(int, platform.libc_ver()[1].split("."))) <= GLIBC:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "libc.so").exists():
        (folder / "user.c").write_text(USER)
        (folder / "absent.c").write_text(ABSENT)
        caches = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig-local")}
        target = f"{platform.machine()}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-o", "user.so", "user.c"]
        if subprocess.run(zig, cwd=folder, env={**os.environ, **caches}).returncode != 0:
            raise SystemExit("the libraries of an old glibc were not written; pip install ziglang")
        for library in folder.glob("zig/o/*/lib*.so.*"):
            shutil.copy(library, folder)
        shutil.rmtree(folder / "zig")
        shutil.rmtree(folder / "zig-local", ignore_errors=True)
        for name in ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"):
            (folder / name.rpartition(".")[0]).symlink_to(name)
        subprocess.run(["cc", "-O2", "-fPIC", "-c", "absent.c", "-o", "absent.o"], cwd=folder, check=True)
        subprocess.run(["ar", "rcs", "libabsent.a", "absent.o"], cwd=folder, check=True)
        static = subprocess.check_output(["cc", "-print-file-name=libc_nonshared.a"], text=True).strip()
        rest = " ".join(str(folder / name) for name in ("libpthread.so.0", "libdl.so.2", "librt.so.1", "libld.so.2"))
        script = f"GROUP ( {folder}/libc.so.6 {folder}/libabsent.a {static} AS_NEEDED ( {rest} ) )\n"
        (folder / "libc.so").write_text(script)
    return [f"-L{folder}"]


def build_sdist(out: Path) -> Path:
    run([sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(ROOT)], os.environ)
    (sdist,) = out.glob("*.tar.gz")
    return sdist


def builder_of(version: tuple[int, int], python: str) -> Path:
    """An environment of this interpreter that has what the build needs; of the one that runs this script, its own."""
    from build import ProjectBuilder

    if python == sys.executable:
        return Path(python)

    # cmake and ninja are those of this environment: one for all, or CMake would begin anew for each.
    folder = FOLDER / f"python3.{version[1]}"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run([python, "-m", "venv", str(folder)], os.environ)
        needed = ProjectBuilder(ROOT).build_system_requires
        needed = sorted(need for need in needed if not need.startswith(PROGRAMS))
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, *needed], os.environ)
        (folder / "complete").touch()
    return folder / "bin" / "python"


def run(command: list[str], environment: dict | os._Environ, folder: Path = ROOT) -> None:
    if subprocess.run(command, env=environment, cwd=folder).returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")


def build_wheel(version: tuple[int, int], python: str, tree: Path, environment: dict, out: Path) -> Path:
    builder = builder_of(version, python)
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=FOLDER) as folder:
        pip = [str(builder), "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
        run([*pip, "--no-build-isolation", "--wheel-dir", folder, "."], environment, tree)
        (built,) = Path(folder).glob("*.whl")
        grade = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", f"{folder}/graded", str(built)]
        result = subprocess.run(grade, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if result.returncode != 0:
            raise SystemExit(f"{built.name} was not graded:\n{result.stdout}")
        (graded,) = Path(folder, "graded").glob("*.whl")
        wheel = out / graded.name
        shutil.move(graded, wheel)
        run([sys.executable, str(ROOT / "scripts" / "read_wheel.py"), str(wheel)], os.environ)
        shutil.unpack_archive(wheel, Path(folder, "unpacked"), "zip")
        (module,) = Path(folder, "unpacked").glob("fused_optim/_C*.so")
        run([python, "-c", LOAD, str(module)], os.environ)
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter to build for; may be repeated")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheels go (default: dist)")
    arguments = parser.parse_args()
    # The build finds cmake and ninja on PATH, auditwheel patchelf: those of this environment before others.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    missing = [package for module, package in MODULES.items() if importlib.util.find_spec(module) is None]
    missing += [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        raise SystemExit(f"building wheels needs {', '.join(missing)}: pip install -r requirements/wheels.txt")

    found = interpreters(arguments.python)
    FOLDER.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    link = [*old_glibc(FOLDER / "glibc"), "-static-libstdc++", "-Wl,--gc-sections,-s"]
    environment = {
        **os.environ,
        "LDFLAGS": " ".join(link),
        "FUSED_OPTIM_BUILD_FOLDER": os.environ.get("FUSED_OPTIM_BUILD_FOLDER") or str(FOLDER / "cmake"),
        "FUSED_OPTIM_EXTENSION": "ON",
        "FUSED_OPTIM_CUDA_ARCHS": os.environ.get("FUSED_OPTIM_CUDA_ARCHS") or "ALL",
        "PATH": path,
    }
    with tempfile.TemporaryDirectory(prefix="sdist-", dir=FOLDER) as folder:
        sdist = build_sdist(Path(folder))
        shutil.copy(sdist, arguments.out)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        # Always the same path, so that what was compiled for one interpreter, or by an earlier run, counts.
        tree = FOLDER / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        Path(folder, sdist.name.removesuffix(".tar.gz")).rename(tree)
    for version, python in found.items():
        began = time.monotonic()
        wheel = build_wheel(version, python, tree, environment, arguments.out)
        print(f"{wheel.name}: built in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
