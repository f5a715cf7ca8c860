"""Reads from a wheel what decides where it installs and loads, and refuses one that would not.

    python scripts/read_wheel.py dist/*.whl

A wheel is good if its tag promises glibc 2.28 or older, if the module asks for no symbol that such a system lacks and
for no library but the C runtime's and libgcc_s, exports its entry point alone, and if it has at most 10 MB.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

GLIBC = (2, 28)  # RHEL 8 and what is built from it
LIBRARIES = r"lib(m|c|pthread|dl|rt)\.so\.\d|ld-linux[\w.-]*\.so\.\d|libgcc_s\.so\.1"
LARGEST = 10_000_000
# What GCC 8's libgcc_s has, which RHEL 8 ships.
VERSIONS = {"GLIBC": GLIBC, "GCC": (8, 0)}


@dataclass
class Module:
    """What the dynamic linker will be asked."""

    name: str
    needed: set[str]
    versions: set[str]
    unversioned: set[str]
    exported: set[str]


def read_module(name: str, data: bytes) -> Module:
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(data))
    dynamic = elf.get_section_by_name(".dynamic")
    needed = {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
    required = elf.get_section_by_name(".gnu.version_r")
    versions = {version.name for _, versions in required.iter_versions() for version in versions}
    numbers = elf.get_section_by_name(".gnu.version")
    symbols = elf.get_section_by_name(".dynsym")
    unversioned, exported = set(), set()
    for index in range(1, symbols.num_symbols()):
        symbol = symbols.get_symbol(index)
        if symbol["st_shndx"] != "SHN_UNDEF":
            exported.add(symbol.name)
        elif symbol["st_info"]["bind"] != "STB_WEAK" and isinstance(numbers.get_symbol(index)["ndx"], str):
            unversioned.add(symbol.name)
    return Module(name, needed, versions, unversioned, exported)


def faults_of(module: Module) -> list[str]:
    """Why an old system could not load the module; empty if it can."""
    faults = []
    if others := sorted(library for library in module.needed if not re.fullmatch(LIBRARIES, library)):
        faults.append(f"needs {', '.join(others)}")
    for version in sorted(module.versions):
        family, _, number = version.partition("_")
        newest = VERSIONS.get(family)
        if newest is None or tuple(map(int, number.split("."))) > newest:
            faults.append(f"asks for symbols of {version}")
    if unknown := sorted(symbol for symbol in module.unversioned if not re.match(r"_?Py", symbol)):
        faults.append(f"asks for {', '.join(unknown)}, of no version")
    if module.exported != {"PyInit__C"}:
        faults.append(f"exports {', '.join(sorted(module.exported)) or 'nothing'}, not PyInit__C alone")
    return faults


def tag_faults(wheel: Path) -> list[str]:
    *_, platform = wheel.stem.split("-")
    promised = [
        tuple(map(int, found)) for found in re.findall(r"manylinux_(\d+)_(\d+)_\w+?(?=\.manylinux|$)", platform)
    ]
    if not promised:
        return [f"its tag, {platform}, is not manylinux's"]
    return [] if min(promised) <= GLIBC else [f"its tag, {platform}, promises too little"]


def read(wheel: Path) -> tuple[list[Module], list[str]]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        modules = [read_module(name, archive.read(name)) for name in names]
    faults = [f"holds {len(modules)} modules, not one"] if len(modules) != 1 else []
    faults += [f"{module.name} {fault}" for module in modules for fault in faults_of(module)]
    if wheel.stat().st_size > LARGEST:
        faults.append(f"has {wheel.stat().st_size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}")
    return modules, faults + tag_faults(wheel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="+", type=Path)
    bad = False
    for wheel in parser.parse_args().wheel:
        modules, faults = read(wheel)
        newest = max(
            (v for m in modules for v in m.versions if v.startswith("GLIBC_")), key=version_key, default="none"
        )
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, symbols up to {newest}")
        for fault in faults:
            print(f"{wheel.name} {fault}", file=sys.stderr)
        bad = bad or bool(faults)
    sys.exit(bad)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.partition("_")[2].split(".")))


if __name__ == "__main__":
    main()
