"""Installs a wheel into a fresh environment in a temporary folder and takes one AdamW step there.

The environment borrows torch from the interpreter that runs this script, so nothing is downloaded.

    python scripts/check_wheel.py dist/*.whl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

STEP = """
import sys
from pathlib import Path

import torch

import fused_optim

expected_backend, environment = sys.argv[1:]
location = Path(fused_optim.__file__).resolve()
assert location.is_relative_to(Path(environment).resolve()), f"not the wheel: {location}"

torch.manual_seed(0)
values, grad = torch.randn(1000), torch.randn(1000)
results = []
for module in (torch.optim, fused_optim):
    param = torch.nn.Parameter(values.clone())
    param.grad = grad.clone()
    optimizer = module.AdamW([param], lr=1e-2)
    optimizer.step()
    results.append(param.detach())
assert optimizer.backend == expected_backend, f"backend {optimizer.backend}, expected {expected_backend}"
assert not torch.equal(results[1], values), "the step changed nothing"
torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)

fused_optim.show_config()
print(f"one AdamW step by the {optimizer.backend} backend: as torch.optim.AdamW")
"""


def check(wheel: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fused_optim-wheel-") as folder:
        environment = Path(folder, "environment")
        venv.create(environment, with_pip=False, symlinks=os.name != "nt")
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # Before torch's folder is lent: pip would find a development install of the same name there.
        install = [
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-index",
            str(wheel.resolve()),
        ]
        subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)

        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.check_output([python, "-c", query], text=True).strip()
        lent = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        Path(packages, "lent.pth").write_text("\n".join(lent) + "\n")

        elsewhere = Path(folder, "elsewhere")
        elsewhere.mkdir()
        backend = "eager" if wheel.name.endswith("-none-any.whl") else "cpu"
        # A forced backend or a PYTHONPATH of the caller's would decide what is checked here.
        clean = {name: value for name, value in os.environ.items() if name not in ("FUSED_OPTIM_BACKEND", "PYTHONPATH")}
        command = [str(python), "-c", STEP, backend, str(environment)]
        subprocess.run(command, check=True, cwd=elsewhere, env=clean)
    print(f"{wheel.name}: good")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="+", type=Path, help="of several, those for this interpreter are taken")
    wheels = parser.parse_args().wheel
    mine = [wheel for wheel in wheels if wheel.name.split("-")[2] in (f"cp3{sys.version_info.minor}", "py3")]
    if not mine:
        parser.error(f"none of {', '.join(wheel.name for wheel in wheels)} is for Python 3.{sys.version_info.minor}")
    for wheel in mine:
        check(wheel)


if __name__ == "__main__":
    main()
