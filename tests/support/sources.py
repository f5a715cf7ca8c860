"""Where the sources lie. A guard asks here for the files that it reads, and says how many it knows of.

A guard that looked in one folder would find nothing once the files have moved to another, and pass.
"""

from __future__ import annotations

from pathlib import Path

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
CPP = (".h", ".cpp", ".cu")


def sources(folder: str, *endings: str, at_least: int, root: Path = ROOT) -> list[Path]:
    """All files below a folder whose names end so.

    Raises:
        AssertionError: there are fewer than the caller knows of.
    """
    found = sorted(
        path
        for path in (root / folder).rglob("*")
        if path.name.endswith(endings) and not {"_build", "__pycache__"} & set(path.parts)
    )
    assert len(found) >= at_least, f"{folder} holds {len(found)} files ending in {endings}, not {at_least} or more"
    return found
