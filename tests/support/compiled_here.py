"""A program in front of the compiler: what this environment's build has compiled by the same command is taken from it.

CMake is told of it by CMAKE_CXX_COMPILER_LAUNCHER. Where a flag, a source or the compiler differs, the compiler runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
# Where scripts/build_wheels.py unpacks what it has packed.
UNPACKED = ROOT / "build" / "wheels" / "tree"
DEPENDENCIES = {"-MD": 1, "-MT": 2, "-MF": 2}  # options for a file that ninja reads, and how many words they take


def what_decides(command: list[str], named: str) -> list[str]:
    """A command without the words that change nothing in the object."""
    words = iter(command)
    kept = []
    for word in words:
        if word in DEPENDENCIES:
            for _ in range(DEPENDENCIES[word] - 1):
                next(words)
        elif word != "-Werror" and not (word.startswith("-D") and word[2:].partition("=")[0] not in named):
            kept.append(word)
    return kept


def compiled(command: list[str]) -> Path | None:
    """The object that the same command made of the same source; None where there is none."""
    if "-c" not in command or not (BUILT / "compile_commands.json").exists():
        return None
    command = [word.replace(str(UNPACKED), str(ROOT)) for word in command]
    source = Path(command[command.index("-c") + 1])
    texts = [source, *(ROOT / "csrc").rglob("*.h")]
    named = "".join(text.read_text() for text in texts if text.exists())
    for entry in json.loads((BUILT / "compile_commands.json").read_text()):
        built = BUILT / entry["output"]
        if what_decides(shlex.split(entry["command"]), named) == what_decides(command, named) and built.exists():
            newest = max(text.stat().st_mtime for text in texts)
            return built if built.stat().st_mtime > newest else None
    return None


if __name__ == "__main__":
    arguments = sys.argv[1:]
    found = compiled(arguments)
    if found is None:
        os.execvp(arguments[0], arguments)
    shutil.copy(found, arguments[arguments.index("-o") + 1])
