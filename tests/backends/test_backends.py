"""Which backend serves: the choice, how it is forced, and what is said when it cannot be had."""

from __future__ import annotations

import io
import logging
import re

import pytest
import torch
from torch.nn import Parameter

import fused_optim
from fused_optim.backends import choice, extension
from fused_optim.report import config


def test_cpu_tensors_go_through_the_cpu_backend() -> None:
    optimizer = fused_optim.AdamW([Parameter(torch.ones(2))])
    assert optimizer.backend == "cpu"
    assert "backend: cpu" in repr(optimizer)


def test_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_OPTIM_BACKEND", "eager")
    assert fused_optim.AdamW([Parameter(torch.ones(2))]).backend == "eager"
    assert fused_optim.AdamW([Parameter(torch.ones(2))], backend="cpu").backend == "cpu"


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='gpu' is not a backend; choose from cuda, triton, cpu, eager"):
        fused_optim.AdamW([Parameter(torch.ones(2))], backend="gpu")
    monkeypatch.setenv("FUSED_OPTIM_BACKEND", "fast")
    with pytest.raises(ValueError, match="FUSED_OPTIM_BACKEND='fast'"):
        fused_optim.AdamW([Parameter(torch.ones(2))])


def test_forced_backend_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_missing", lambda backend, device: "the reason")
    with pytest.raises(RuntimeError, match="backend='triton' cannot be used: the reason"):
        fused_optim.AdamW([Parameter(torch.ones(2))], backend="triton")


def test_forced_backend_asks_the_devices_of_the_parameters_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking makes a CUDA context, which takes memory on that device."""
    asked = []
    monkeypatch.setattr(choice, "why_missing", lambda backend, device: asked.append(device))
    choice.check_forced("cuda", [torch.device("cuda", 3), torch.device("cpu"), torch.device("cuda", 3)])
    assert asked == [3]


def test_forced_backend_without_a_tensor_of_its_own() -> None:
    with pytest.raises(ValueError, match="takes no tensor on meta"):
        fused_optim.AdamW([Parameter(torch.ones(2, device="meta"))], backend="cpu")


def test_missing_extension_falls_back_visibly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = Parameter(torch.ones(5))
    compiled.grad = torch.ones(5)
    fused_optim.AdamW([compiled]).step()
    monkeypatch.setattr(extension, "_C", None)
    monkeypatch.setattr(extension, "missing", "the reason")
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    with caplog.at_level(logging.WARNING, logger="fused_optim"):
        optimizer = fused_optim.AdamW([param])
        optimizer.step()
        param.grad = torch.ones(5)
        optimizer.step()
    assert optimizer.backend == "eager"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the reason" in line
    assert choice.why_missing("cpu") == "the reason"


def test_show_config_names_versions_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_why_no_triton", lambda: "the reason")
    out = io.StringIO()
    fused_optim.show_config(file=out)
    for word in (fused_optim.__version__, torch.__version__, "cpu tensors"):
        assert word in out.getvalue()
    assert re.search("no triton backend +the reason", out.getvalue())


class OldTensor(torch.Tensor):
    """torch's before it had the exchange API."""

    __dlpack_c_exchange_api__ = None


@pytest.mark.parametrize("has_api", [pytest.param(True, marks=pytest.mark.requires(torch="2.9")), False])
def test_show_config_says_which_reader_serves_and_why(monkeypatch: pytest.MonkeyPatch, has_api: bool) -> None:
    if not has_api:
        monkeypatch.setattr(torch, "Tensor", OldTensor)
        monkeypatch.setattr(config, "negative_bit", lambda: None)
        monkeypatch.setattr(config, "tensor_shim", lambda: None)
    out = io.StringIO()
    fused_optim.show_config(file=out)
    if has_api:
        assert re.search("^tensor reader +torch's C shim$", out.getvalue(), re.MULTILINE)
    else:
        why = f"a Python function, slower than DLPack's C exchange API: torch {torch.__version__} has none"
        assert re.search(f"^tensor reader +{re.escape(why)}", out.getvalue(), re.MULTILINE)
    asked = "a bit that" if has_api else "each tensor is asked, slower"
    assert re.search(f"^pending negations +{asked}", out.getvalue(), re.MULTILINE)


@pytest.mark.interpreted
def test_interpreted_kernels_serve_no_gpu() -> None:
    assert not choice.takes("triton", torch.device("cuda"))
    assert choice.takes("triton", torch.device("cpu"))
    backend, passed_over = choice.choose(torch.device("cuda"))
    assert backend == "eager"
    assert "no triton backend: under TRITON_INTERPRET=1 it takes CPU tensors" in str(passed_over)
