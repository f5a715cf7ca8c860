"""Arguments of other libraries' optimizers: each is refused with its answer, and the page says the same."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from support.sources import ROOT
from torch.nn import Parameter

import fused_optim
from fused_optim.options.peers import PEER_ARGUMENTS, PEERS, PeerArgument

OPTIMIZERS = [
    kind
    for name in fused_optim.__all__
    if isinstance(kind := getattr(fused_optim, name), type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not fused_optim.FusedOptimizer
]


def first_argument(kind: Any) -> Any:
    param = Parameter(torch.ones(2))
    return torch.optim.SGD([param]) if kind is fused_optim.LARC else [param]


def own_arguments(kind: Any) -> set[str]:
    return set(inspect.signature(kind).parameters)


@pytest.mark.parametrize("argument", PEER_ARGUMENTS, ids=lambda argument: argument.name)
@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_an_argument_of_another_library_is_answered(kind: Any, argument: PeerArgument) -> None:
    own = argument.name in own_arguments(kind)
    if own and argument.value_type is None:
        return
    value = argument.value_type() if own and argument.value_type is not None else 1
    with pytest.raises(TypeError) as caught:
        kind(first_argument(kind), **{argument.name: value})
    text = str(caught.value)
    assert text.startswith(kind.__name__)
    assert argument.answer in text
    assert all(word in text for word in (argument.name, *argument.peers))


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind is not fused_optim.LARC])
@pytest.mark.parametrize("value", [True, False])
def test_masters_that_are_true_or_false(kind: Any, value: bool) -> None:
    with pytest.raises(TypeError, match=rf"master_weights cannot be {value}.*'float32' for True.*None for False"):
        kind(first_argument(kind), master_weights=value)


def test_what_nobody_has_is_refused_by_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'quickly'"):
        fused_optim.AdamW([Parameter(torch.ones(2))], quickly=True)


def test_a_subclass_is_answered_by_its_own_name() -> None:
    class Mine(fused_optim.Adam):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)

    with pytest.raises(TypeError, match="Mine has no argument 'set_grad_none'"):
        Mine([Parameter(torch.ones(2))], set_grad_none=True)


def test_answers_name_arguments_that_exist() -> None:
    ours = set().union(*map(own_arguments, OPTIMIZERS)) | {"set_to_none"}
    for argument in PEER_ARGUMENTS:
        assert set(re.findall(r"(\w+)=", argument.answer)) <= ours, argument.name


def test_answers_are_needed() -> None:
    """What every optimizer has is nothing to answer; a name stands once."""
    names = [argument.name for argument in PEER_ARGUMENTS]
    assert len(set(names)) == len(names)
    for argument in PEER_ARGUMENTS:
        assert argument.value_type or any(argument.name not in own_arguments(kind) for kind in OPTIMIZERS)


@pytest.mark.parametrize("peer", PEERS)
def test_the_page_lists_the_table(peer: str) -> None:
    rows = [f"| `{argument.name}` | {argument.answer} |" for argument in PEER_ARGUMENTS if peer in argument.peers]
    table = "\n".join([f"### {peer}", "", "| argument | here |", "|---|---|", *rows])
    assert f"{table}\n\n" in (ROOT / "docs" / "swap.md").read_text() + "\n", f"docs/swap.md should have:\n{table}"


def test_lars_has_timms_learning_rate() -> None:
    assert fused_optim.LARS([Parameter(torch.ones(2))]).param_groups[0]["lr"] == 1.0
