"""What is shipped: the files of wheel and sdist, what the module links to, a build without a compiler."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

import pytest
from support.sources import ROOT, sources

# Each build takes all processors.
pytestmark = [pytest.mark.program, pytest.mark.xdist_group("packaging")]

FOLDERS = ("bench", "csrc", "docs", "examples", "fused_optim", "kernels", "requirements", "scripts", "tests")
ROOT_FILES = (
    ".clang-format",
    "CHANGELOG.md",
    "CMakeLists.txt",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
# Folders of the repository and the packages that they are installed as.
PACKAGES = {"fused_optim": "fused_optim", "kernels": "fused_optim/kernels", "bench": "fused_optim/bench"}
BUILT = shutil.ignore_patterns(
    "*.so", "_no_extension.txt", "*.pyc", "__pycache__", "_build", ".*_cache", ".hypothesis", "*.egg-info"
)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository as it would be checked out, to build in and to break."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ROOT_FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=BUILT)
    return copy


def build(tree: Path, kind: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m build`, with the build requirements of this environment: nothing is downloaded."""
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(tree)]
    # Without CUDA, where the test is not about it: the builds are shorter.
    variables = {**os.environ, "FUSED_OPTIM_CUDA": "OFF", **environment}
    return subprocess.run(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def build_one(tree: Path, kind: str, out: Path, **environment: str) -> Path:
    result = build(tree, kind, out, **environment)
    assert result.returncode == 0, result.stdout
    (archive,) = out.iterdir()
    return archive


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def sdist_files(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def expected_wheel_files(version: str) -> set[str]:
    files = {
        f"{package}/{name}"
        for folder, package in PACKAGES.items()
        for name in files_below(ROOT / folder)
        if name.endswith((".py", ".pyi", "py.typed"))
    }
    info = ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    return files | {f"fused_optim-{version}.dist-info/{name}" for name in info}


def without_metadata(files: set[str]) -> set[str]:
    return {name for name in files if name not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in name}


def test_every_folder_of_modules_is_shipped() -> None:
    """setuptools is given a list, and leaves out without a word what is not in it."""
    settings = (ROOT / "pyproject.toml").read_text().partition("[tool.setuptools]")[2]
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?\])", settings, re.MULTILINE | re.DOTALL)[1])
    folders = {
        Path(package, path.parent.relative_to(ROOT / folder))
        for folder, package in PACKAGES.items()
        for path in sources(folder, ".py", at_least=16)
    }
    assert set(listed) == {".".join(folder.parts) for folder in folders}


def test_sdist_holds_the_whole_tree_and_nothing_that_was_built(tree: Path, tmp_path: Path) -> None:
    sdist = build_one(tree, "sdist", tmp_path / "dist")
    expected = set(ROOT_FILES)
    for folder in FOLDERS:
        expected |= {f"{folder}/{name}" for name in files_below(tree / folder)}
    assert without_metadata(sdist_files(sdist)) == expected


NO_COMPILER = {"PATH": "", "CXX": ""}


@pytest.mark.parametrize(
    ("variables", "reason", "takes_a_step"),
    [
        (NO_COMPILER, "no C++ compiler was found (c++, g++, clang++, or what CXX names)", False),
        ({"FUSED_OPTIM_EXTENSION": "OFF"}, "FUSED_OPTIM_EXTENSION=OFF was set", True),
    ],
    ids=["no compiler", "OFF"],
)
def test_pure_python_wheel_says_why_it_is_one_and_takes_a_step(
    tree: Path, tmp_path: Path, variables: dict[str, str], reason: str, takes_a_step: bool
) -> None:
    """The step of one of them: the wheels differ in their reason alone."""
    version = metadata.version("fused_optim")
    left_over = tree / "build" / "lib" / "fused_optim" / "removed_since.py"
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    wheel = build_one(tree, "wheel", tmp_path / "dist", **variables)
    assert wheel.name == f"fused_optim-{version}-py3-none-any.whl"
    assert wheel_files(wheel) == expected_wheel_files(version) | {"fused_optim/_no_extension.txt"}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("fused_optim/_no_extension.txt").decode() == f"{reason}\n"
    if not takes_a_step:
        return
    check = [sys.executable, ROOT / "scripts/check_wheel.py", wheel]
    said = subprocess.run(check, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    reason = f"installed without the compiled extension: {reason}"
    slower = "AdamW: the eager path serves parameters on cpu, slower than torch.optim's own steps: no cpu backend: "
    assert slower + reason in said.splitlines()
    assert re.search(f"^extension +missing: {re.escape(reason)}$", said, re.MULTILINE)
    assert re.search("^no cpu backend +no extension$", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"CXX": "no-such-compiler -O2"},
            "CXX='no-such-compiler -O2' names no program; name a C++ compiler, or unset CXX",
        ),
        ({"FUSED_OPTIM_EXTENSION": "ON", **NO_COMPILER}, "or what CXX names); apt install g++ (Debian, Ubuntu)"),
        ({"FUSED_OPTIM_EXTENSION": "yes"}, "FUSED_OPTIM_EXTENSION is AUTO, ON or OFF; got 'yes'"),
    ],
    ids=["CXX", "ON without a compiler", "unknown word"],
)
def test_extension_that_was_asked_for_and_cannot_be_built_fails_the_build(
    tree: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    result = build(tree, "wheel", tmp_path / "dist", **variables)
    assert result.returncode != 0
    assert message in result.stdout
    assert not list((tmp_path / "dist").glob("*.whl"))


LOOK = """
import fused_optim, fused_optim.kernels.rules.adamw, torch
print(fused_optim.__file__)
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
optimizer = fused_optim.AdamW([param])
optimizer.step()
print(optimizer.backend)
"""


def import_in(tree: Path, site: Path) -> tuple[list[str], list[str]]:
    """What Python prints and logs when it is started in a source tree, with another folder to import from."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run([sys.executable, "-c", LOOK], cwd=tree, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr.splitlines()


def install_copy(site: Path, version: str) -> Path:
    """The package with its extension as pip would lay it into a folder."""
    package = site / "fused_optim"
    for folder, name in PACKAGES.items():
        shutil.copytree(ROOT / folder, site / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"fused_optim-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fused_optim\nVersion: {version}\n")
    return package


def test_tree_that_is_not_built_takes_the_installed_extension(tree: Path, tmp_path: Path) -> None:
    installed = install_copy(tmp_path / "site", metadata.version("fused_optim"))
    printed, logged = import_in(tree, tmp_path / "site")
    assert printed == [str(tree / "fused_optim" / "__init__.py"), "cpu"]
    assert logged == [
        f"fused_optim is imported from its source tree {tree}, in which no extension is built for this Python; the one "
        f"installed in {installed} serves; run `pip install --editable {tree}`, or leave that folder"
    ]


@pytest.mark.parametrize("installed", ["0.0.7", None])
def test_tree_that_is_not_built_says_so(tree: Path, tmp_path: Path, installed: str | None) -> None:
    here = f"fused_optim is imported from its source tree {tree}, in which no extension is built for this Python"
    remedy = f"run `pip install --editable {tree}`"
    if installed is None:
        said = f"{here}; {remedy}"
    else:
        folder = install_copy(tmp_path / "site", installed)
        said = f"{here}; the one installed in {folder} is of version {installed}; {remedy}, or leave that folder"
    printed, logged = import_in(tree, tmp_path / "site")
    assert printed == [str(tree / "fused_optim" / "__init__.py"), "eager"]
    slower = "AdamW: the eager path serves parameters on cpu, slower than torch.optim's own steps: no cpu backend: "
    assert logged == [said, slower + said]


def load_extension(package: Path) -> ModuleType:
    """The module that looks for the compiled extension, of a copy of the package, by another name."""
    spec = util.spec_from_file_location("copied.backends.extension", package / "backends" / "extension.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_extension_for_another_python_is_named(tmp_path: Path) -> None:
    installed = install_copy(tmp_path / "site", metadata.version("fused_optim"))
    (module,) = installed.glob("_C.*.so")
    other = module.rename(installed / "_C.cpython-30-x86_64-linux-gnu.so")
    printed, (logged,) = import_in(tmp_path, tmp_path / "site")
    assert printed == [str(installed / "__init__.py"), "eager"]
    version = sys.version.split()[0]
    assert logged.endswith(f"the compiled extension {other} is for another Python than this one, {version}")


@pytest.mark.parametrize("left", ["", "no library"], ids=["none", "no library"])
def test_extension_that_is_missing_or_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    package = tmp_path / "copied"
    (package / "backends").mkdir(parents=True)
    parent = ModuleType("copied")
    parent.__path__ = [str(package)]
    monkeypatch.setitem(sys.modules, "copied", parent)
    shutil.copy(ROOT / "fused_optim" / "backends" / "extension.py", package / "backends" / "extension.py")
    module = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if left:
        module.write_text(left)
    said = load_extension(package).missing
    if left:
        assert said.startswith(f"the compiled extension cannot be loaded: {module}: ")
    else:
        assert said == f"the compiled extension is missing from {package}; install fused_optim again"


def test_a_copy_of_the_package_without_its_metadata_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyInstaller makes one."""

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    copied = tmp_path / "copied" / "backends" / "extension.py"
    copied.parent.mkdir(parents=True)
    shutil.copy(ROOT / "fused_optim" / "backends" / "extension.py", copied)
    monkeypatch.setattr(metadata, "version", version)
    module = load_extension(copied.parents[1])
    assert module.version == "unknown"
    assert module.missing == f"the compiled extension is missing from {copied.parents[1]}; install fused_optim again"


def test_compile_error_fails_the_build(tree: Path, tmp_path: Path) -> None:
    for source in sources("csrc", ".cpp", at_least=5, root=tree):
        source.write_text("#error this source does not compile\n")
    result = build(tree, "wheel", tmp_path / "dist")
    assert result.returncode != 0
    assert "this source does not compile" in result.stdout
    assert not list((tmp_path / "dist").glob("*.whl"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"FUSED_OPTIM_CUDA": "ON", "CUDACXX": "no-such-nvcc"},
            "FUSED_OPTIM_CUDA=ON, but no working nvcc was found",
        ),
        ({"FUSED_OPTIM_CUDA": "yes"}, "FUSED_OPTIM_CUDA is AUTO, ON or OFF; got 'yes'"),
    ],
    ids=["ON without nvcc", "unknown word"],
)
def test_cuda_that_was_asked_for_and_cannot_be_built_fails_the_build(
    tree: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    (tree / "csrc" / "empty.cu").touch()
    result = build(tree, "wheel", tmp_path / "dist", **variables)
    assert result.returncode != 0
    assert message in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sdist_builds_the_wheel_that_the_tree_builds(tree: Path, tmp_path: Path) -> None:
    version = metadata.version("fused_optim")
    from_tree = build_one(tree, "wheel", tmp_path / "from_tree")
    sdist = build_one(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    from_sdist = build_one(unpacked, "wheel", tmp_path / "from_sdist")

    assert from_sdist.name == from_tree.name
    assert not from_sdist.name.endswith("-none-any.whl")
    assert wheel_files(from_sdist) == wheel_files(from_tree)
    (module,) = wheel_files(from_sdist) - expected_wheel_files(version)
    assert re.fullmatch(r"fused_optim/_C\.[\w.-]+\.so", module)
    subprocess.run([sys.executable, ROOT / "scripts/check_wheel.py", from_sdist], check=True)


def test_metadata_says_what_users_need() -> None:
    described = metadata.metadata("fused_optim")
    assert described["License-Expression"] == "BSD-3-Clause"
    assert described["Requires-Python"] == ">=3.10"
    needed = [need for need in metadata.requires("fused_optim") or [] if "extra ==" not in need]
    torch, triton = sorted(needed)
    assert torch == "torch>=2.8"
    assert triton.startswith("triton>=3.4")
    assert 'sys_platform == "linux"' in triton


@pytest.fixture(scope="module")
def module() -> Path:
    import fused_optim._C

    return Path(fused_optim._C.__file__)


def readelf(option: str, file: Path) -> str:
    return subprocess.check_output(["readelf", "--wide", option, str(file)], text=True)


def dynamic_symbols(file: Path, *, defined: bool) -> set[str]:
    rows = (line.split() for line in readelf("--dyn-syms", file).splitlines())
    return {row[7] for row in rows if len(row) >= 8 and row[0][:-1].isdigit() and (row[6] != "UND") is defined}


@pytest.mark.requires("readelf")
def test_module_links_to_the_c_and_cpp_runtimes_only(module: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic", module)))
    runtimes = r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|libdl|librt)\.so\.\d+|ld-linux[\w.-]*\.so\.\d+"
    assert {library for library in needed if not re.fullmatch(runtimes, library)} == set()
    assert not re.search(r"\((RPATH|RUNPATH)\)", readelf("--dynamic", module))


@pytest.mark.requires("readelf")
def test_undefined_symbols_are_those_of_python_and_the_runtimes(module: Path) -> None:
    """None of torch's (c10, at::, THP): that is why one wheel serves every torch."""
    known = r"_?Py\w*|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+|__gmon_start__|__cxa_finalize"
    undefined = dynamic_symbols(module, defined=False)
    assert "PyModule_Create2" in undefined or len(undefined) > 50  # readelf's table was understood
    assert {symbol for symbol in undefined if not re.fullmatch(known, symbol)} == set()


@pytest.mark.requires("readelf")
def test_module_exports_its_entry_point_only(module: Path) -> None:
    assert dynamic_symbols(module, defined=True) == {"PyInit__C"}


CAPABILITY_FLAGS = {
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}


@pytest.mark.requires("c++", "nm")
@pytest.mark.parametrize("capability", CAPABILITY_FLAGS if platform.machine() == "x86_64" else [])
def test_kernels_share_no_function_with_the_rest(tmp_path: Path, capability: str) -> None:
    """The linker merges weak symbols, and might keep the copy that old machines cannot run."""
    source = ROOT / "csrc" / "cpu" / "kernels.cpp"
    folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}" / "CMakeFiles" / f"kernels_{capability}.dir"
    kernels = folder / source.relative_to(ROOT).with_suffix(".cpp.o")
    if not kernels.exists() or kernels.stat().st_mtime < source.stat().st_mtime:  # an environment built elsewhere
        kernels = tmp_path / "kernels.o"
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
        flags += [*CAPABILITY_FLAGS[capability], f"-DFO_CPU_CAPABILITY={capability}", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["c++", *flags, "-c", source, "-o", kernels], check=True)
    listing = subprocess.check_output(["nm", "--defined-only", "--extern-only", kernels], text=True)
    shared = {line.split()[-1] for line in listing.splitlines()}
    assert shared
    assert {symbol for symbol in shared if capability not in symbol} == set()
