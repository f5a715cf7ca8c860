"""The bench harness: it measures what it says, goes on when a peer fails, and README shows its figures."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_optim.bench import cases, commands, measure, profile_step, states, training, write_shapes
from fused_optim.bench import peers as peers_package
from fused_optim.bench.__main__ import main
from fused_optim.bench.accuracy import max_error
from fused_optim.bench.cases import CASES, elements_of
from fused_optim.bench.contenders import Contender, ours
from fused_optim.bench.footprint import bytes_of_step, state_bytes
from fused_optim.bench.machine import commit
from fused_optim.bench.material import Material, make_material
from fused_optim.bench.measure import Setting, measure_setting
from fused_optim.bench.models import MODELS
from fused_optim.bench.optimizers import RECIPES
from fused_optim.bench.peers import PEERS, Missing
from fused_optim.bench.peers.peer import Peer
from fused_optim.bench.peers.timm import timm
from fused_optim.bench.profile import StepProfile
from fused_optim.bench.results import TABLES, load
from fused_optim.bench.settings import SETTINGS, STRESSED
from fused_optim.bench.shapes import dump, read_shapes, shapes_of
from support.sources import ROOT, sources

import fused_optim

CPU = torch.device("cpu")
ADAMW = RECIPES["AdamW"]

# What measures does not measure beside itself.
pytestmark = [pytest.mark.program, pytest.mark.xdist_group("bench")]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line within this process: its exit status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        monkeypatch.setattr(measure, "BLOCK_SECONDS", 1e-3)
        try:
            return main()
        except SystemExit as left:
            return int(left.code or 0)

    return run


# The named cases --------------------------------------------------------------------------------------------------


def test_step_writes_what_it_measured(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert bench("step", "--case", "150 tensors, 1 group", "--rounds", 3, "--json", out) == 0
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    assert case["case"] == "150 tensors, 1 group"
    assert case["backend"] == "cpu"
    assert 0 < case["ours_us"] < 1e6
    assert result["machine"]["torch"]
    assert "150 tensors" in capsys.readouterr().out


@pytest.mark.requires(modules=("timm",))
def test_every_case_takes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many tensors as are measured, and smaller ones."""
    new_groups, matrices = cases.new_groups, cases.matrices

    def small_groups(groups: int, tensors: int, numel: int, *dtype: torch.dtype) -> Any:
        return new_groups(groups, tensors, min(numel, 64), *dtype)

    def small_matrices(shapes: Iterable[tuple[int, int]]) -> Any:
        return matrices(
            (rows // 16, columns // 16) if rows * columns > 4096 else (rows, columns) for rows, columns in shapes
        )

    monkeypatch.setattr(cases, "new_groups", small_groups)
    monkeypatch.setattr(cases, "matrices", small_matrices)
    for case in CASES.values():
        stepped = case.ours()
        stepped.step()
        with suppress(Missing):  # what other peers than timm are
            case.theirs().step()
        assert 0 < elements_of(stepped) < 1e6


def test_readme_shows_the_committed_figures() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_figures.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sources("bench/results", ".json", at_least=5), ids=lambda path: path.stem)
def test_committed_results_are_whole(path: Path) -> None:
    result = load(path)
    assert not result["interrupted"]
    assert re.fullmatch(r"[0-9a-f]{7,40}", result["machine"]["commit"]), "measure from a clean commit"
    assert any(result[table] for table in TABLES)
    assert f"results/{path.name}" in (ROOT / "bench" / "README.md").read_text()


# Models and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "groups"),
    [
        ("resnet-50", 25_557_032, 161, 2),  # torchvision
        ("vit-b-16", 86_567_656, 152, 28),  # torchvision, timm
        ("vit-l-16", 304_326_632, 296, 52),
        ("bert-large", 335_141_888, 391, 2),  # with the pooler, without heads
        ("gpt2-xl", 1_557_611_200, 580, 2),
        ("llama-3-8b", 8_030_261_248, 291, 2),
        ("quartznet-15x5", 18_924_381, 358, 2),  # published as 18.9 M
        ("rf-detr-nano", 30_467_298, 465, 465),  # published as 30.5 M and 465 tensors
        ("dense-1g", 1_000_000_000, 40, 1),
        ("groups-50", 16_000, 1000, 50),
    ],
)
def test_models_have_the_published_size(name: str, parameters: int, tensors: int, groups: int) -> None:
    model = MODELS[name]()
    assert (model.numel, model.tensors, len(model.groups)) == (parameters, tensors, groups)
    assert model.name == name
    assert model.merged().numel == parameters
    assert len(model.merged().groups) == 1
    assert model.twin().numel == 2 * tensors


def test_rf_detr_has_28_pairs_of_learning_rate_and_decay() -> None:
    groups = MODELS["rf-detr-nano"]().groups
    assert len({(group.lr_scale, group.weight_decay_scale) for group in groups}) == 28


def test_shapes_are_those_of_whatever_has_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[1].bias.requires_grad_(False)
    expected = {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (1, 2)}
    (whole,) = shapes_of(model).groups
    (by_name,) = shapes_of(model.named_parameters()).groups
    assert whole.tensors == by_name.tensors == expected
    (bare,) = shapes_of(model.parameters()).groups
    assert list(bare.tensors.values()) == list(expected.values())
    groups = [{"params": [("w", model[0].weight)]}, {"params": [("b", model[0].bias)], "lr": 5e-4}]
    first, second = shapes_of(fused_optim.AdamW(groups, lr=1e-3)).groups
    assert (first.tensors, second.tensors, second.lr_scale) == ({"w": (2, 3)}, {"b": (2,)}, 0.5)
    assert len(shapes_of(fused_optim.AdamW(model.parameters())).groups[0].tensors) == 3


@pytest.mark.parametrize("source", [3, "model", torch.ones(2), [1, 2], [("a", 1)], iter(()), {"a": 1}])
def test_shapes_of_something_else_are_refused(tmp_path: Path, source: Any) -> None:
    path = tmp_path / "shapes.json"
    with pytest.raises(TypeError, match=r"takes a model, an optimizer, model.parameters\(\) or .* first argument, got"):
        write_shapes(source, path)
    assert not path.exists()


def test_shapes_of_a_users_model_come_back(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)
    path = tmp_path / "shapes.json"
    write_shapes(model, path)
    assert read_shapes(path) == shapes_of(model).__class__("Sequential", shapes_of(model).groups, str(path))
    assert read_shapes(path).groups[0].tensors["0.weight"] == (4, 8)
    groups = [
        {"params": list(model[0].parameters()), "lr": 1e-3, "weight_decay": 0.1},
        {"params": list(model[2].parameters()), "lr": 2e-3, "weight_decay": 0.0},
    ]
    write_shapes(model, path, optimizer=torch.optim.AdamW(groups))
    first, second = read_shapes(path).groups
    assert (first.lr_scale, first.weight_decay_scale) == (0.5, 1.0)
    assert (second.lr_scale, second.weight_decay_scale) == (1.0, 0.0)
    assert list(second.tensors) == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match="not one that the model trains"):
        write_shapes(torch.nn.Linear(3, 3), path, optimizer=torch.optim.AdamW(groups))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "has no list of groups"),
        ('{"groups": [{"tensors": {}}]}', r"groups\[0\] has no mapping of tensors"),
        ('{"groups": [{"tensors": {"a": [2, -1]}}]}', r"the shape of 'a'.*\[2, -1\]"),
        ('{"groups": [{"tensors": {"a": [2]}}, {"tensors": {"a": [3]}}]}', "'a' stands there a second time"),
        ('{"groups": [{"lr_scale": -1, "tensors": {"a": [2]}}]}', "are numbers of 0 or more"),
    ],
)
def test_a_file_that_is_no_shapes_file_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_shapes(path)


def test_shapes_are_listed_and_printed(bench: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("shapes") == 0
    assert "25,557,032" in capsys.readouterr().out
    assert bench("shapes", "tiny") == 0
    assert capsys.readouterr().out == dump(MODELS["tiny"]())


BOTH = """
import contextlib, runpy, sys
sys.path.insert(0, "")
for module in ("bench", "fused_optim.bench"):
    sys.argv = [module, "shapes", "tiny"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    print("", flush=True)
"""


def test_the_checkout_and_the_installed_module_are_one_program() -> None:
    done = subprocess.run([sys.executable, "-c", BOTH], capture_output=True, text=True, check=True, cwd=ROOT)
    shapes = dump(MODELS["tiny"]())
    assert done.stdout == f"{shapes}\n{shapes}\n", done.stderr


# What is measured -------------------------------------------------------------------------------------------------


@pytest.mark.requires(modules=("timm",))
def test_the_grid_has_all_optimizers_and_figures(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    peers = ("torch-fused", "torch-fused-merged", "timm", "apex")
    options = [option for peer in peers for option in ("--peer", peer)]
    options += ["--model", "tiny", "--device", "cpu", "--backend", "cpu", "--optimizer", "all", "--rounds", "2"]
    assert bench("step", *options, "--json", out) == 0
    rows = load(out)["grid"]
    assert {row["optimizer"] for row in rows} == set(RECIPES)
    for recipe in RECIPES:
        expected = {peer for peer in peers if recipe in PEERS[peer].makers} - {"apex"}
        measured = {row["contender"] for row in rows if row["optimizer"] == recipe and row["status"] == "measured"}
        assert measured == {"fused_optim/cpu", *expected}
    for row in rows:
        if row["status"] != "measured":
            assert re.match("has no|needs", row["reason"])
            continue
        assert row["reason"] == "", row
        low, high = row["wall_quartiles_us"]
        assert 0 < low <= row["wall_us"] <= high
        for figure in ("host_us", "host_us_per_tensor", "bytes_moved", "share_of_copy", "peak_bytes"):
            assert row[figure] > 0
        assert row["temporary_bytes"] >= 0
        assert 0 < row["processor_us"] < 3 * torch.get_num_threads() * row["wall_us"]
        assert ("ours_times_as_fast" in row) == (row["contender"] != "fused_optim/cpu")
        if row["contender"] in ("fused_optim/cpu", "torch-fused"):
            assert row["max_error"] < 3e-7
    fastest = next(row for row in rows if row["optimizer"] == "AdamW" and row["contender"] == "torch-fused-merged")
    assert fastest["note"] == "all parameters in one group, with one learning rate and one weight decay"
    assert "fused_optim/cpu" in capsys.readouterr().out


def test_accuracy_trains_every_setting(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setattr(training, "LAYERS", {"language": 1, "vision": 1})
    monkeypatch.setattr(training, "BATCH", {"language": 2, "vision": 2})
    for model, stress, settings in (("language", "spike", STRESSED), ("vision", "none", SETTINGS)):
        command = ("accuracy", "--seeds", 2, "--steps", 2, "--model", model, "--stress", stress, "--json", out)
        assert bench(*command) == 0
        printed = capsys.readouterr().out
        rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith(f"| {model}")]
        assert {row[2] for row in rows} == set(settings)
        assert next(float(row[3]) for row in rows if row[2] == "float32") >= 12
        assert [row[5] for row in rows if row[2] == "float32"] == ["+0.0000 ± 0.0000"]
        kept = load(out)["trainings"]
        assert [row["setting"] for row in kept] == list(settings)
        assert all(len(row["losses"]) == 2 and row["model"] == model for row in kept)


def test_states_are_as_far_from_exact_as_memory_says() -> None:
    """In short: a spike in the middle of 60 steps, and 300 steps after the fall."""
    rows = {row["setting"]: row for row in states.rows(60, 100, 300)}
    exact, coded = rows["float32"], rows["float32, 8bit"]
    assert exact["update_error"] == 0
    assert exact["root_ratios_after_fall"] == [1, 1, 1]
    assert 0 < coded["update_error"] < 0.05
    assert abs(coded["largest_update"] / exact["largest_update"] - 1) < 0.1
    assert coded["largest_update_after_spike"] < 3 * exact["largest_update_after_spike"]
    assert 0.97 < coded["root_ratios_after_fall"][1] < 1.03
    assert rows["float32, bfloat16 states"]["root_ratios_after_fall"][1] > 1.1  # they do not fall


def test_settings_of_states_and_masters_are_contenders(bench: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    grid = ("--model", "matrices-1m", "--dtype", "float32", "--dtype", "bfloat16", "--backend", "cpu", "--peer", "none")
    assert bench("step", *grid, "--memory", "--rounds", 2, "--json", out, "--device", "cpu") == 0
    rows = load(out)["grid"]
    assert all(row["status"] == "measured" and row["ours"] for row in rows)
    names = {(row["dtype"], row["contender"]): row["state_bytes_per_parameter"] for row in rows}
    assert len(names) == len(SETTINGS)
    found = {
        'fused_optim/cpu, master_weights="split"': 10,
        'fused_optim/cpu, master_weights="split8", state_dtype="8bit"': 3.0625,
        "fused_optim/cpu": 4,
    }
    for name, held in found.items():
        assert abs(names["bfloat16", name] - held) < 1e-4


def new_peer(name: str, step: Callable[[Material], Any], make: Callable[[Material], None] | None = None) -> Peer:
    """A peer of AdamW that takes torch's step and then something else."""

    class Stepper:
        def __init__(self, material: Material) -> None:
            if make is not None:
                make(material)
            self.optimizer = torch.optim.SGD(material.flat, lr=0.0)
            self.material = material

        def step(self) -> None:
            self.optimizer.step()
            step(self.material)

    return Peer(name, "torch", {"AdamW": lambda material, hyper: Stepper(material)})


def give_up(error: BaseException, after: int = 0) -> Callable[[Material], None]:
    calls = iter(range(10**9))

    def step(material: Material) -> None:
        if next(calls) >= after:
            raise error

    return step


def diverge(material: Material) -> None:
    with torch.no_grad():
        material.flat[0].fill_(math.nan)


def use_peers(monkeypatch: pytest.MonkeyPatch, *peers: Peer) -> None:
    by_name = {peer.name: peer for peer in peers}
    for module in (peers_package, sys.modules["fused_optim.bench.contenders"], commands):
        monkeypatch.setattr(module, "PEERS", by_name)


def test_a_peer_that_fails_has_a_row_and_the_run_goes_on(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_peers(
        monkeypatch,
        new_peer("asleep", lambda material: time.sleep(2e-3)),
        new_peer("crashing at once", lambda material: None, give_up(TypeError("no such argument\nsecond line"))),
        new_peer("crashing later", give_up(RuntimeError("illegal access"), after=20)),
        new_peer("diverging", diverge),
        new_peer("out of memory", give_up(torch.OutOfMemoryError("tried to take 80 GiB"))),
        Peer("elsewhere", "torch", {"AdamW": lambda *_: None}, devices=("cuda",)),
        new_peer("last", lambda material: None),
    )
    out = tmp_path / "result.json"
    assert bench("step", "--model", "tiny", "--device", "cpu", "--rounds", 4, "--json", out) == 0
    rows = {row["contender"]: row for row in load(out)["grid"]}
    statuses = {name: (row["status"], row["reason"]) for name, row in rows.items() if "fused_optim" not in name}
    assert statuses == {
        "asleep": ("measured", ""),
        "crashing at once": ("failed", "TypeError: no such argument"),
        "crashing later": ("failed", "RuntimeError: illegal access"),
        "diverging": ("diverged", "its parameters are not finite after the steps"),
        "out of memory": ("skipped", "out of memory: tried to take 80 GiB"),
        "elsewhere": ("skipped", "needs a CUDA device"),
        "last": ("measured", ""),
    }
    # The ratio is to our fastest, whatever order the optimizers were made in.
    asleep = rows["asleep"]
    assert asleep["ours_times_as_fast"] > 3  # which sleeps for 2 ms
    assert asleep["wall_us"] > 2000
    # These two leave the parameters as they are, which three steps of AdamW do not.
    assert asleep["max_error"] > 1e-3


def test_what_does_not_fit_is_skipped_or_measured_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(ADAMW, MODELS["tiny"](), torch.float32, CPU)
    four = [ours(ADAMW, "cpu"), *(peer_contender(name) for name in ("a", "b", "c"))]
    monkeypatch.setattr(measure, "free_bytes", lambda device: 0)
    rows = list(measure_setting(setting, four, 2))
    assert {row["status"] for row in rows} == {"skipped"}
    assert rows[0]["reason"] == "out of memory: needs about 0.0 GB, 0.0 GB are free"
    alive: list[int] = []
    made = [0]

    def counted(entries: list[Any], *arguments: Any) -> None:
        alive.append(len(entries))
        made[0] += 1
        original(entries, *arguments)

    original = measure.measure_half
    monkeypatch.setattr(measure, "measure_half", counted)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2.5 / 0.9 * measure.bytes_needed(setting, 1))
    rows = list(measure_setting(setting, four, 2))
    assert alive == [2] * 6  # ours and one peer, in both orders
    assert [row["status"] for row in rows] == ["measured"] * 4
    assert all("ours_times_as_fast" in row for row in rows[1:])


def peer_contender(name: str) -> Contender:
    return Contender(name, lambda material: torch.optim.AdamW(material.groups(ADAMW.hyper), fused=True), "torch")


def test_ctrl_c_leaves_what_was_measured(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt_for_the_second_model(material: Material) -> None:
        if material.model.name == "groups-1":
            raise KeyboardInterrupt

    use_peers(monkeypatch, new_peer("interrupted", interrupt_for_the_second_model))
    out, report = tmp_path / "result.json", tmp_path / "report.md"
    command = ["step", "--model", "tiny", "--model", "groups-1", "--device", "cpu", "--rounds", 2, "--json", out]
    assert bench(*command, "--report", report) == 130
    result = load(out)
    assert result["interrupted"]
    assert {row["model"] for row in result["grid"]} == {"tiny"}
    assert "interrupted" in report.read_text()
    assert "kept" in capsys.readouterr().out


def test_inputs_rotate_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["tiny"]()
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 2 * 7 * 4 * model.numel)
    setting = Setting(ADAMW, model, torch.float32, CPU)
    runner = measure.Runner(ours(ADAMW, "cpu"), setting, 6)
    addresses = {material.flat[0].data_ptr() for material in runner.materials}
    assert len(addresses) == 6
    before = [
        stepper.state[material.flat[0]]["step"].item() for stepper, material in zip(runner.steppers, runner.materials)
    ]
    runner.block(6)
    after = [
        stepper.state[material.flat[0]]["step"].item() for stepper, material in zip(runner.steppers, runner.materials)
    ]
    assert [new - old for old, new in zip(before, after)] == [1.0] * 6
    (row,) = measure_setting(setting, [ours(ADAMW, "cpu")], 2, rotate=True)
    assert row["rotated_copies"] == 6


def rows_of_table(begin: str) -> list[list[str]]:
    text = (ROOT / "bench" / "README.md").read_text().partition(f"<!-- {begin}:begin -->")[2]
    lines = text.partition(f"<!-- {begin}:end -->")[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", rows_of_table("bytes"), ids=lambda row: row[0])
def test_bytes_a_step_moves_are_those_of_the_readme(row: list[str]) -> None:
    recipe = RECIPES[row[0]]
    for dtype, once, twice in (("float32", row[1], row[2]), ("bfloat16", row[3], row[4])):
        material = make_material(MODELS["dense-1m"](), getattr(torch, dtype), CPU)
        stepper = recipe.ours(material, recipe.hyper, {"backend": "cpu"})
        stepper.step()
        states = state_bytes(stepper)
        assert round(bytes_of_step(material, states) / 1e6) == int(once)
        assert round(bytes_of_step(material, states, recipe.read_twice) / 1e6) == int(twice)


def test_the_readme_has_a_row_for_each_optimizer() -> None:
    assert [row[0] for row in rows_of_table("bytes")] == list(RECIPES)


def test_states_that_are_shared_or_wrapped_count_once() -> None:
    material = make_material(MODELS["tiny"](), torch.float32, CPU)
    optimizer = torch.optim.AdamW(material.flat)
    optimizer.step()
    numel, tensors = material.model.numel, material.model.tensors
    assert state_bytes(optimizer) == 8 * numel + 4 * tensors
    table = torch.zeros(256)
    for param in material.flat:
        optimizer.state[param]["table"] = table
    assert state_bytes(optimizer) == 8 * numel + 4 * tensors + 1024


def test_max_error_sees_a_wrong_step() -> None:
    right = max_error(ADAMW, ours(ADAMW, "cpu"), torch.float32, CPU)
    assert 0 < right < 3e-7
    wrong = Contender(
        "wrong", lambda material: torch.optim.AdamW(material.groups({**ADAMW.hyper, "lr": 2e-3})), "torch"
    )
    assert max_error(ADAMW, wrong, torch.float32, CPU) > 1e-3


# Peers ------------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="pip install --no-deps timm"):
        timm("lamb", "Lamb")
    for peer in PEERS.values():
        if peer.distribution != "torch":
            assert re.search("install|build it from", peer.why_missing() or ""), peer.name
            assert peer.why_not(peer.devices[0]) == peer.why_missing()


def test_the_other_apex_is_not_taken_for_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('needs pyramid')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert "another project" in (PEERS["apex"].why_missing() or "")


def test_peers_that_need_cuda_say_so() -> None:
    needing = {name for name, peer in PEERS.items() if peer.devices == ("cuda",)}
    assert needing == {"torch-graphed", "flashoptim", "deepspeed", "transformer-engine", "apex"}
    assert {PEERS[name].why_not("cpu") for name in needing} == {"needs a CUDA device"}
    assert PEERS["deepspeed-cpu"].why_not("cuda") == "needs a cpu device"


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--case", "150 tensors, 2 groups"), "near: 150 tensors, 1 group"),
        (("--optimizer", "AdamV"), "near: Adam, AdamW"),
        (("--model", "resnet50"), "near: resnet-50"),
        (("--model", __file__), f"is a file: --shapes {__file__}"),
        (("--peer", "torch-fussed"), "near: torch-fused"),
        (("--dtype", "float23"), "near: float32"),
        (("--backend", "cudo"), "near: cuda"),
        (("--device", "tpu:0"), "--device 'tpu:0' is no device"),
        (("--device", "meta"), "measures on cpu and cuda"),
        (("--rounds", "0"), "0 is not a number of 1 or more"),
        (("--shapes", "nowhere.json"), "nowhere.json: No such file"),
        (("--report", "report.pdf"), "ends in .html or .md"),
        (("--model", "tiny", "--json", "/proc/nowhere/result.json"), "cannot be written"),
    ],
)
def test_what_is_not_known_is_refused_with_near_misses(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    assert bench("step", *arguments) == 2
    assert complaint in capsys.readouterr().err


# Comparing, reports, profiles -------------------------------------------------------------------------------------


def result_with(us: float, ratio: float, **machine: Any) -> dict[str, Any]:
    row = {
        "optimizer": "AdamW",
        "model": "tiny",
        "dtype": "float32",
        "device": "cpu",
        "status": "measured",
        "noisy": False,
    }
    mine = {**row, "contender": "fused_optim/cpu", "ours": True}
    mine |= {"wall_us": us, "step_us": us, "wall_quartiles_us": [0.95 * us, 1.05 * us]}
    peer = {**row, "contender": "torch-fused", "ours": False, "wall_us": 100.0, "step_us": 100.0}
    peer |= {"ours_times_as_fast": ratio, "ours_times_as_fast_quartiles": [0.95 * ratio, 1.05 * ratio]}
    return {"machine": {"cpu": "one", **machine}, "cases": [], "grid": [mine, peer]}


@pytest.mark.parametrize(
    ("after", "options", "status", "said"),
    [
        (result_with(10.5, 9.5), (), 0, "0 of 1"),  # within the threshold
        (result_with(15, 6.7), (), 1, "1 of 1"),
        (result_with(15, 6.7), ("--threshold", 0.6), 0, "0 of 1"),
        (result_with(5, 20), (), 0, "0 of 1"),
        (result_with(30, 10, cpu="two"), (), 0, "cpu: one and two"),  # slower, and so is the peer
        (result_with(10, 5, cpu="two"), (), 1, "1 of 1"),
        ({**result_with(10, 10), "grid": []}, (), 2, "no case in common"),
        ({"no": "result"}, (), 2, "is no result of this harness"),
        (result_with(10, 10), ("--threshold", -1), 2, "--threshold"),
    ],
)
def test_compare_flags_what_is_slower(
    bench: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    after: dict[str, Any],
    options: tuple[Any, ...],
    status: int,
    said: str,
) -> None:
    files = tmp_path / "a.json", tmp_path / "b.json"
    for file, content in zip(files, (result_with(10, 10), after)):
        file.write_text(json.dumps(content))
    assert bench("compare", *files, *options) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_a_regression_within_the_noise_is_none(bench: Callable[..., int], tmp_path: Path) -> None:
    files = tmp_path / "a.json", tmp_path / "b.json"
    noisy = result_with(15, 10)
    noisy["grid"][0]["wall_quartiles_us"] = [9, 30]
    for file, content in zip(files, (result_with(10, 10), noisy)):
        file.write_text(json.dumps(content))
    assert bench("compare", *files) == 0


def test_committed_results_compare_with_themselves(bench: Callable[..., int]) -> None:
    path = ROOT / "bench" / "results" / "cpu.json"
    assert bench("compare", path, path) == 0


def test_a_report_has_its_figures_in_it(bench: Callable[..., int], tmp_path: Path) -> None:
    out, page = tmp_path / "result.json", tmp_path / "report.html"
    grid = [option for name in ("dense-1m", "dense-4m", "groups-1", "groups-10") for option in ("--model", name)]
    peers = ("--peer", "torch-fused", "--backend", "cpu", "--device", "cpu")
    assert bench("step", *grid, *peers, "--rounds", 2, "--json", out, "--report", page) == 0
    text = page.read_text()
    assert re.findall(r'<img alt="(\w+)" src="data:image/svg', text) == ["ratios", "roofline", "groups", "scaling"]
    assert "http://" not in text
    assert "https://" not in text  # self-contained
    assert "AdamW, dense-4m, float32, cpu" in text
    assert bench("report", out, tmp_path / "report.md") == 0
    images = re.findall(r"!\[\w+\]\((.+?)\)", (tmp_path / "report.md").read_text())
    assert len(images) == 4
    assert all((tmp_path / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_a_report_of_one_model_shows_the_pace_of_each_contender(bench: Callable[..., int], tmp_path: Path) -> None:
    out, page = tmp_path / "result.json", tmp_path / "report.html"
    peers = ("--peer", "torch-fused", "--peer", "apex", "--backend", "cpu", "--device", "cpu")
    assert bench("step", "--model", "tiny", *peers, "--rounds", 2, "--json", out, "--report", page) == 0
    text = page.read_text()
    assert re.findall(r'<img alt="(\w+)" src="data:image/svg', text) == ["ratios", "pace"]
    assert '<meta name="viewport" content="width=device-width' in text
    assert "apex: skipped: needs a CUDA device" in text


def columns_of(text: str) -> list[tuple[str, list[str]]]:
    """Heading and cells of each column of the grid's tables; every cell says its heading where it stands alone."""
    found = []
    for table in re.findall(r"<table>(.*?)</table>", text, re.DOTALL):
        headings = re.findall(r"<th>(.*?)</th>", table)
        rows = [re.findall(r'<td data-label="(.*?)".*?>(.*?)</td>', row) for row in re.findall(r"<tr.*?</tr>", table)]
        assert all([label for label, _ in row] == headings for row in rows[1:])
        found += [(heading, [row[place][1] for row in rows[1:]]) for place, heading in enumerate(headings)]
    return found


def test_a_report_has_no_empty_column(bench: Callable[..., int], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert bench("report", ROOT / "bench" / "results" / "cpu-grid.json", page) == 0
    columns = columns_of(page.read_text())
    assert {"contender", "step [µs]", "of copy", "max error"} <= {heading for heading, _ in columns}
    assert [heading for heading, cells in columns if not any(cells)] == []
    assert "launches" not in {heading for heading, _ in columns}  # of a GPU


def test_profile_names_the_phases(bench: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert (
        bench("profile", "--model", "tiny", "--optimizer", "lamb", "--tokens", 4, "--device", "cpu", "--trace", trace)
        == 0
    )
    said = capfd.readouterr().out
    assert "fused_optim/cpu LAMB, tiny" in said
    assert "forward and backward (a stand-in: matrix products)" in said
    lines = [float(line.split(" ms  ")[0].replace(",", "")) for line in said.splitlines() if " ms  " in line]
    whole = re.search(r"a step takes (\S+) ms: .*?\) (\S+) ms, optimizer (\S+) ms", said)
    assert whole is not None
    step, model, optimizer = (float(number.replace(",", "")) for number in whole.groups())
    assert len(lines) >= 3
    assert round(sum(lines), 3) == optimizer
    assert round(model + optimizer, 3) == step
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"forward and backward", "optimizer step", "fused_optim: apply (reduce, prepare, apply)"} <= names


def test_profile_takes_a_users_own_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(16, 16)
    optimizer = fused_optim.AdamW(model.parameters(), backend="eager")

    def forward_backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 16)).sum().backward()

    found = profile_step(forward_backward, optimizer, tmp_path / "trace.json")
    assert 0 < found.optimizer < found.step
    assert 0 < found.phases["eager (torch operations)"] < found.optimizer
    assert sum(found.phases.values()) == pytest.approx(found.optimizer)
    assert not found.stand_in
    optimizer.step()  # the optimizer is as it was
    assert "_step_witness" not in vars(optimizer)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        profile_step(optimizer.zero_grad, optimizer, tmp_path / "trace.json")


@pytest.mark.parametrize(
    ("host", "copy", "said"),
    [(0.7, 0.1, "host-bound: 70%"), (0.1, 0.8, "bandwidth-bound: .* 80%"), (0.1, 0.2, "neither alone: .*20%.*10%")],
)
def test_profile_says_what_bounds_the_optimizer(host: float, copy: float, said: str) -> None:
    found = StepProfile("", 4.0, 1.0, host, 1, copy, {}, Path("trace.json"), False, "cpu")
    assert re.search(said, found.text())
    assert "(25.0%)" in found.text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--peer", "apex", "--device", "cpu"), "--peer apex: needs a CUDA device"),
        (("--peer", "timm", "--optimizer", "Adam"), "has no Adam"),
        (("--device", "meta"), "measures on cpu and cuda"),
        (("--model", "tini"), "near: tiny"),
    ],
)
def test_profile_refuses_what_it_cannot(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], complaint: str
) -> None:
    assert bench("profile", *arguments) == 2
    assert complaint in capsys.readouterr().err


def test_without_rich_the_remedy_is_said() -> None:
    code = "import runpy, sys; sys.modules['rich'] = None; runpy.run_module('fused_optim.bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install rich matplotlib")


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # whatever folder the harness is used in
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    known = commit()
    assert known == "unknown" if head.returncode else head.stdout.startswith(known.removesuffix("-dirty"))


def test_sharded_parameters_are_timed_in_processes(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sharded.json"
    assert bench("sharded", "--processes", 1, "--rounds", 1, "--json", output) == 0
    assert [row["case"].split(", 465")[0] for row in load(output)["cases"]] == ["AdamW", "AdamW, global-norm clip"]
    assert "465 DTensors in 1 processes" in capsys.readouterr().out


LAUNCHER = """
import sys
from fused_optim.bench import __main__, launcher
launcher.LAYOUTS = {"30 tensors, 1 group": (30, 1), "20 groups of 1 tensor": (20, 20)}
sys.exit(__main__.main())
"""


@pytest.mark.requires(modules=("triton",))
def test_the_launcher_is_timed_without_a_gpu(tmp_path: Path) -> None:
    output = tmp_path / "launcher.json"
    command = [sys.executable, "-c", LAUNCHER, "launcher", "--rounds", "1", "--json", str(output)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [row["case"] for row in load(output)["cases"]]
    assert names[:2] == ["refresh in Python, 30 tensors, 1 group", "host's part of a step, 30 tensors, 1 group"]
    assert names[2:] == [
        "refresh in Python, 20 groups of 1 tensor",
        "host's part of a step, 20 groups of 1 tensor",
        "one launch of apply",
    ]


def test_a_device_sleeps_until_a_block_has_been_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the events there are only steps that the host has launched before: an idle device would be the host's."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def elapsed_time(self, other: Event) -> float:
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep" if cycles > 1e6 else "nap"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    runner = measure.Runner.__new__(measure.Runner)
    runner.device, runner.turn = torch.device("cuda"), 0
    runner.steppers = [SimpleNamespace(step=lambda: (calls.append("step"), time.sleep(1e-3)))]
    assert runner.block(2).device == 4e-3
    assert calls == [
        *("synchronize", "step", "step", "synchronize"),
        *("sleep", "record", "step", "step", "record", "synchronize"),
    ]
