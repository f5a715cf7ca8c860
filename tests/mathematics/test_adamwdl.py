"""AdamWDL: its ratios and masks, what they multiply with, and each input that is refused."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, GOLDEN, assert_same_results, each_implementation, train
from torch import Tensor
from torch.nn import Parameter

from fused_optim import AdamW, AdamWDL, layerwise_lr_decay

NAMES = (
    "embeddings.word_embeddings.weight",
    "encoder.layers.0.linear1.weight",
    "encoder.layers.0.norm1.bias",
    "encoder.layers.3.linear1.weight",
    "encoder.norm.weight",
    "decoder.layers.1.linear1.weight",
    "pooler.dense.weight",
)
RATIOS = (0.5**5, 0.5**4, 0.5**4, 0.5, 1.0, 1.0, 1.0)
DEEP = {"layerwise_decay": 0.5, "n_layers": 4}


def named(prefix: str = "", dtype: torch.dtype = torch.float32) -> list[tuple[str, Parameter]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (prefix + name, Parameter(torch.randn(5, 7, generator=generator)[: 5 if "weight" in name else 1].to(dtype)))
        for name in NAMES
    ]


def params_of(parameters: list[tuple[str, Parameter]]) -> list[Parameter]:
    return [param for _, param in parameters]


def trained(optimizer: torch.optim.Optimizer, steps: int = 3) -> torch.optim.Optimizer:
    train(optimizer, [param for group in optimizer.param_groups for param in group["params"]], steps)
    return optimizer


# The ratio ------------------------------------------------------------------------------------------------------

# (name, n_layers, the exponent of the rate); from running PaddleNLP 2.8.1.
EXPONENTS = [
    ("encoder.layers.11.linear1.weight", 12, 1),
    ("encoder.layers.0.linear1.weight", 12, 12),
    ("encoder.layers.7", 12, 5),
    ("ernie.encoder.layers.1.linear1.weight", 12, 11),
    ("encoder.layers.2.embedding.weight", 12, 10),
    ("embeddings.word_embeddings.weight", 12, 13),
    ("model.embed_tokens.weight", 12, 0),
    ("decoder.layers.3.linear1.weight", 12, 0),
    ("pooler.dense.weight", 12, 0),
    ("classifier.bias", 12, 0),
]


@pytest.mark.parametrize(("name", "n_layers", "exponent"), EXPONENTS)
def test_ratio_is_paddles(name: str, n_layers: int, exponent: int) -> None:
    param = SimpleNamespace(name="linear_0.w_0")
    assert layerwise_lr_decay(0.8, {"linear_0.w_0": name}, n_layers, param) == 0.8**exponent
    assert layerwise_lr_decay(0.8, None, n_layers, SimpleNamespace(name=name)) == 0.8**exponent


@pytest.mark.parametrize(("layer", "ratio"), [(2, 1.0), (4, 0.25**-2)])
def test_layer_beyond_n_layers_warns(layer: int, ratio: float, fallbacks: list[str]) -> None:
    name = f"encoder.layers.{layer}.weight"
    assert layerwise_lr_decay(0.25, None, 2, SimpleNamespace(name=name)) == ratio
    assert len(fallbacks) == 1
    assert fallbacks[0].startswith("WARNING")
    assert name in fallbacks[0]


@each_implementation
def test_ratio_scales_rate_and_decay(backend: str) -> None:
    ours = named()
    theirs = [(name, Parameter(param.detach().clone())) for name, param in ours]
    layered = AdamWDL(ours, 1e-2, weight_decay=0.3, backend=backend, **DEEP)
    scaled = AdamW(params_of(theirs), 1e-2, weight_decay=0.3, backend=backend, lr_scale=RATIOS)
    grouped = torch.optim.AdamW(
        [{"params": [p.detach().clone().requires_grad_()], "lr": 1e-2 * ratio} for (_, p), ratio in zip(ours, RATIOS)],
        weight_decay=0.3,
        foreach=False,
    )
    for optimizer in (layered, scaled, grouped):
        trained(optimizer)
    assert_same_results(layered, scaled)
    for (name, param), group in zip(ours, grouped.param_groups, strict=True):
        torch.testing.assert_close(param, group["params"][0], rtol=1e-5, atol=1e-6, msg=name)


@each_implementation
@pytest.mark.parametrize("scaling", ["scaled", "base", "double"])
def test_decay_takes_the_rate_that_was_chosen(scaling: str, backend: str) -> None:
    """Without gradients to speak of, only the decay moves a parameter."""
    parameters = named(dtype=torch.float64)
    before = [param.detach().clone() for _, param in parameters]
    optimizer = AdamWDL(parameters, 0.1, weight_decay=0.5, decay_scaling=scaling, backend=backend, **DEEP)
    for _, param in parameters:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for (name, param), old, ratio in zip(parameters, before, RATIOS, strict=True):
        base, scaled = 1 - 0.1 * 0.5, 1 - 0.1 * ratio * 0.5
        factor = {"scaled": scaled, "base": base, "double": base * scaled}[scaling]
        torch.testing.assert_close(param.detach(), old * factor, rtol=1e-15, atol=0, msg=name)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
@pytest.mark.parametrize("own_dict", [False, True])
def test_wrappers_change_nothing(prefix: str, own_dict: bool) -> None:
    plain, wrapped = named(), named(prefix)
    names = {name: name for name, _ in wrapped} if own_dict else None
    assert_same_results(trained(AdamWDL(plain, 1e-2, **DEEP)), trained(AdamWDL(wrapped, 1e-2, name_dict=names, **DEEP)))


def test_function_sees_the_parameter_and_its_name() -> None:
    seen: list[tuple[Any, ...]] = []

    def ratio(rate: float, names: Any, n_layers: int, param: Any) -> float:
        seen.append((rate, names[param.name], n_layers, param.shape, param.ndim, param.dtype, param.param))
        return 1.0

    parameters = named()
    AdamWDL(parameters, set_param_lr_fun=ratio, layerwise_decay=torch.tensor(0.5), n_layers=3)
    assert seen == [(0.5, name, 3, param.shape, 2, torch.float32, param) for name, param in parameters]


def test_function_is_asked_at_a_rate_of_one_too() -> None:
    parameters = named()
    optimizer = AdamWDL(parameters, set_param_lr_fun=lambda rate, names, n_layers, param: 0.0, weight_decay=0.5)
    before = [param.detach().clone() for _, param in parameters]
    trained(optimizer)
    assert all(torch.equal(param, old) for (_, param), old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("options", [{}, {"set_param_lr_fun": None, "layerwise_decay": 0.5}])
def test_without_ratios_it_is_adamw(options: dict[str, Any]) -> None:
    assert_same_results(trained(AdamWDL(params_of(named()), 1e-2, **options)), trained(AdamW(params_of(named()), 1e-2)))


def test_lr_scale_multiplies_with_the_ratio() -> None:
    both = AdamWDL(named(), 1e-2, lr_scale={"encoder.*": 0.5}, **DEEP)
    factors = [ratio * (0.5 if name.startswith("encoder") else 1.0) for name, ratio in zip(NAMES, RATIOS, strict=True)]
    assert_same_results(trained(both), trained(AdamW(params_of(named()), 1e-2, lr_scale=factors)))


def test_weight_decay_scale_multiplies_with_the_mask() -> None:
    both = AdamWDL(
        named(), weight_decay=0.5, apply_decay_param_fun=lambda name: "norm" not in name, weight_decay_scale={"p*": 0.5}
    )
    factors = [0.0 if "norm" in name else 0.5 if name.startswith("p") else 1.0 for name in NAMES]
    other = AdamW(params_of(named()), weight_decay=0.5, weight_decay_scale=factors)
    assert_same_results(trained(both), trained(other))


def test_mask_may_answer_in_any_truth_value() -> None:
    one = AdamWDL(named(), apply_decay_param_fun=lambda name: "norm" if "norm" in name else None)  # type: ignore[arg-type]
    other = AdamWDL(named(), apply_decay_param_fun=lambda name: "norm" in name)
    assert_same_results(trained(one), trained(other))


def test_multi_precision_is_float32_masters() -> None:
    optimizer = trained(AdamWDL(named(dtype=torch.bfloat16), multi_precision=True))
    other = trained(AdamWDL(named(dtype=torch.bfloat16), master_weights="float32"))
    assert_same_results(optimizer, other)
    assert all("master_param" in state for state in optimizer.state.values())
    split = trained(AdamWDL(named(dtype=torch.bfloat16), multi_precision=True, master_weights="split"))
    assert all("param_remainder" in state for state in split.state.values())


# Groups, copies and checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["scaled", "double"])
def test_groups_may_differ_in_decay_scaling(scaling: str) -> None:
    one, two = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [
        {"params": [("encoder.layers.0.a", one)]},
        {"params": [("encoder.layers.0.b", two)], "decay_scaling": "base"},
    ]
    optimizer = AdamWDL(groups, 0.1, weight_decay=0.5, layerwise_decay=0.5, n_layers=1, decay_scaling=scaling)
    one.grad, two.grad = torch.zeros(2), torch.zeros(2)
    optimizer.step()
    base, scaled = 1 - 0.1 * 0.5, 1 - 0.1 * 0.5 * 0.5
    torch.testing.assert_close(one.detach(), torch.full((2,), scaled if scaling == "scaled" else base * scaled))
    torch.testing.assert_close(two.detach(), torch.full((2,), base))


def test_group_that_is_none_is_torchs_to_refuse() -> None:
    with pytest.raises(TypeError, match="param_group must be a dict"):
        AdamWDL(named()).add_param_group([Parameter(torch.ones(1))])  # type: ignore[arg-type]


def test_later_group_is_asked_for_its_ratios() -> None:
    optimizer = AdamWDL(named()[:1], 1e-2, **DEEP)
    optimizer.add_param_group({"params": named()[1:]})
    ratios = [row.lr_scale for row in (trained(optimizer), optimizer.plan.rows)[1]]
    assert ratios == list(RATIOS)


def test_later_group_that_is_refused_is_not_added() -> None:
    optimizer = AdamWDL(named(), name_dict={name: name for name in NAMES}, **DEEP)
    for group, error in (
        ({"params": [("encoder.layers.9", Parameter(torch.ones(1)))]}, KeyError),
        ({"params": [("new", Parameter(torch.ones(1)))], "decay_scaling": "half"}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_keep_ratios_and_masks(way: Any) -> None:
    optimizer = AdamWDL(
        named(),
        1e-2,
        weight_decay=0.3,
        set_param_lr_fun=lambda rate, names, n_layers, param: rate,
        apply_decay_param_fun=lambda name: False,
        decay_scaling="double",
        **DEEP,
    )
    assert_same_results(trained(way(optimizer)), trained(optimizer))


def test_checkpoint_has_torchs_keys_unless_decay_scaling_is_chosen() -> None:
    torchs = torch.optim.AdamW(params_of(named())).state_dict()["param_groups"][0]
    assert AdamWDL(params_of(named())).state_dict()["param_groups"][0].keys() == torchs.keys()
    double = AdamWDL(params_of(named()), decay_scaling="double").state_dict()["param_groups"][0]
    assert double.keys() - torchs.keys() == {"decay_scaling"}


@pytest.mark.parametrize("scaling", ["scaled", "base", "double"])
def test_resumed_run_equals_the_uninterrupted_one(scaling: str) -> None:
    def make() -> tuple[list[Parameter], AdamWDL]:
        parameters = named()
        optimizer = AdamWDL(parameters, 1e-2, weight_decay=0.3, decay_scaling=scaling, **DEEP)
        return params_of(parameters), optimizer

    params, optimizer = make()
    train(optimizer, params, 2)
    resumed_params, resumed = make()
    for param, other in zip(resumed_params, params, strict=True):
        param.data.copy_(other.data)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 2, first=2)
    train(resumed, resumed_params, 2, first=2)
    assert_same_results(resumed, optimizer)


# What is refused ------------------------------------------------------------------------------------------------


def answers(value: Any) -> dict[str, Any]:
    return {"set_param_lr_fun": lambda rate, names, n_layers, param: value}


def missing_name(rate: float, names: Any, n_layers: int, param: Any) -> float:
    return float(names[param.name])


FIRST = r"'embeddings.word_embeddings.weight' \(param_groups\[0\]\['params'\]\[0\]\)"
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ratio None": (answers(None), TypeError, f"returned None for {FIRST}; it must return the ratio"),
    "ratio negative": (answers(-0.5), ValueError, f"set_param_lr_fun of {FIRST} must be finite and not negative"),
    "ratio NaN": (answers(math.nan), ValueError, f"of {FIRST} must be finite"),
    "ratio infinite": (answers(math.inf), ValueError, f"of {FIRST} must be finite"),
    "ratio text": (answers("half"), TypeError, f"of {FIRST} must be a number, got 'half'"),
    "function": ({"set_param_lr_fun": 0.5}, TypeError, "set_param_lr_fun must be a callable"),
    "mask": ({"apply_decay_param_fun": ["bias"]}, TypeError, "apply_decay_param_fun must be a callable"),
    "name_dict lacks a name": ({"name_dict": {}, **DEEP}, KeyError, "'embeddings.word_embeddings.weight'"),
    "name_dict by torch's names": ({"name_dict": {None: "x"}, **DEEP}, KeyError, "name_dict has no entry"),
    "name_dict lacks a name, own function": (
        {"name_dict": {}, "set_param_lr_fun": missing_name},
        KeyError,
        "'embeddings.word_embeddings.weight'",
    ),
    "name_dict of another kind": ({"name_dict": [("a", "b")]}, TypeError, "name_dict must be a mapping"),
    "index": (
        {"name_dict": {name: f"encoder.layers.final.{name}" for name in NAMES}, **DEEP},
        ValueError,
        "'embeddings.word_embeddings.weight' has 'encoder.layers'.*no layer number",
    ),
    "index in no place": (
        {"name_dict": dict.fromkeys(NAMES, "encoder.layers_norm.weight"), **DEEP},
        ValueError,
        "'encoder.layers_norm.weight', but no layer number",
    ),
    "index with more": (
        {"name_dict": dict.fromkeys(NAMES, "encoder.layers.1x.weight"), **DEEP},
        ValueError,
        "no layer number",
    ),
    "rate negative": ({"layerwise_decay": -0.5}, ValueError, "layerwise_decay must be finite and not negative"),
    "rate NaN": ({"layerwise_decay": math.nan}, ValueError, "layerwise_decay must be finite"),
    "rate infinite": ({"layerwise_decay": math.inf}, ValueError, "layerwise_decay must be finite"),
    "rate None": ({"layerwise_decay": None}, TypeError, "layerwise_decay must be a number, got None"),
    "rate text": ({"layerwise_decay": "0.5"}, TypeError, "layerwise_decay must be a number, got '0.5'"),
    "rate overflows": ({"layerwise_decay": 1e200, "n_layers": 4}, ValueError, f"of {FIRST} must be finite"),
    "rate of zero beyond n_layers": (
        {"layerwise_decay": 0.0, "n_layers": 2},
        ValueError,
        "'encoder.layers.3.linear1.weight' .* must be finite",
    ),
    "n_layers": ({"n_layers": 1.5}, TypeError, "n_layers must be an int, got 1.5"),
    "n_layers None": ({"n_layers": None}, TypeError, "n_layers must be an int"),
    "n_layers negative": ({"n_layers": -1}, ValueError, "n_layers must not be negative"),
    "decay_scaling": ({"decay_scaling": "twice"}, ValueError, "decay_scaling must be one of .*got 'twice'"),
    "weight_decay None": ({"weight_decay": None}, TypeError, "not supported between instances of"),
    "weight_decay negative": ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value"),
    "beta": ({"betas": (1.0, 0.999)}, ValueError, "Invalid beta parameter at index 0"),
    "eps": ({"eps": -1.0}, ValueError, "Invalid epsilon value"),
    "clip": ({"grad_clip": 1.0}, TypeError, "grad_clip must be"),
    "pattern": ({"lr_scale": {"layer*": 0.5}, **DEEP}, ValueError, r"'layer\*' matches no parameter"),
    "length": ({"lr_scale": [1.0, 2.0], **DEEP}, ValueError, "2 factors, but the optimizer has 7"),
    "product overflows": (
        {"lr_scale": lambda name, param: 1e300, **answers(1e300)},
        ValueError,
        f"lr_scale times set_param_lr_fun of {FIRST} must be finite",
    ),
    "learning_rate": ({"learning_rate": 1e-3}, TypeError, "has no argument 'learning_rate' .Paddle.: write lr="),
    "beta1": ({"beta1": 0.9}, TypeError, r"'beta1' .Paddle.: write betas=\(beta1, beta2\)"),
    "beta2": ({"beta2": 0.99}, TypeError, r"'beta2' .Paddle.: write betas=\(beta1, beta2\)"),
    "epsilon": ({"epsilon": 1e-8}, TypeError, "'epsilon' .Paddle.: write eps="),
    "name": ({"name": "adam"}, TypeError, "'name' .Paddle.: there is none"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_constructor_refuses(wrong: str) -> None:
    options, error, text = WRONG[wrong]
    with pytest.raises(error, match=text):
        AdamWDL(named(), **options)


def test_constructor_refuses_paddles_parameters() -> None:
    with pytest.raises(TypeError, match=r"'parameters' .Paddle.: write params=model.named_parameters\(\)"):
        AdamWDL(parameters=params_of(named()))  # type: ignore[call-arg]


UNNAMED: dict[str, dict[str, Any]] = {
    "rate": {"layerwise_decay": 0.9},
    "function": {"set_param_lr_fun": lambda rate, names, n_layers, param: 1.0 if "norm" in param.name else rate},
    "mask": {"apply_decay_param_fun": lambda name: True},
    "scale": {"lr_scale": lambda name, param: 1.0},
}


@pytest.mark.parametrize("wrong", UNNAMED)
def test_names_are_asked_for(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"names, but param_groups\[0\]\['params'\]\[0\] has none.*named_parameters"):
        AdamWDL(params_of(named()), **UNNAMED[wrong])


def test_names_are_not_asked_for_where_no_function_does() -> None:
    AdamWDL(params_of(named()), set_param_lr_fun=lambda rate, names, n_layers, param: rate**param.ndim)
    AdamWDL(params_of(named()), layerwise_decay=0.9, set_param_lr_fun=None)


def test_every_golden_trajectory_has_a_row() -> None:
    rows = {golden for case in CASES for golden in case.golden if "adamw" in golden}
    assert rows == {path.stem for path in GOLDEN.glob("*adamw*.npz") if not path.stem.startswith("states_")}


def test_ratios_are_numbers_of_a_plan(all_native: None) -> None:
    """One plan, whatever the number of ratios: no param group a layer."""
    parameters = named()
    optimizer = AdamWDL(parameters, apply_decay_param_fun=lambda name: "norm" not in name, **DEEP)
    trained(optimizer)
    assert len(optimizer.param_groups) == 1
    assert [row.lr_scale for row in optimizer.plan.rows] == list(RATIOS)
    assert [row.weight_decay_scale for row in optimizer.plan.rows] == [float("norm" not in name) for name in NAMES]


def test_first_step_is_where_the_ratio_says() -> None:
    """Adam's first step is lr times the sign of the gradient, so its size shows the ratio."""
    parameters = named(dtype=torch.float64)
    before = [param.detach().clone() for _, param in parameters]
    optimizer = AdamWDL(parameters, 0.1, eps=0.0, weight_decay=0.0, **DEEP)
    for _, param in parameters:
        param.grad = torch.full_like(param, 3.0)
    optimizer.step()
    moved: list[Tensor] = [old - param.detach() for (_, param), old in zip(parameters, before, strict=True)]
    for size, ratio in zip(moved, RATIOS, strict=True):
        torch.testing.assert_close(size, torch.full_like(size, 0.1 * ratio))
