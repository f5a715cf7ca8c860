"""Factors from a model's layers: timm's own, those of known families, and LeCun's rule."""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import pytest
import torch
from cases import GOLDEN
from torch import nn
from torch.nn import Parameter

import fused_optim
from fused_optim import fan_in_lr_scale, kept, layer_decay
from fused_optim.plan.planner import build_plan

TIMM = np.load(GOLDEN / "timm_layer_decay.npz")


class Model(nn.Module):
    """A model of nothing but names."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        for name in names:
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, Parameter(torch.zeros(1)))


class Matched(Model):
    """One that groups its names as timm's models do."""

    def __init__(self, names: Iterable[str], matcher: Any) -> None:
        super().__init__(names)
        self.matcher = matcher

    def group_matcher(self, coarse: bool = False) -> Any:
        assert not coarse
        return self.matcher


def by_name(model: nn.Module, scales: dict[Parameter, float]) -> dict[str, float]:
    assert list(scales) == list(model.parameters())
    return {name: scales[param] for name, param in model.named_parameters()}


# timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TIMM.files if name != "meta"])
def test_factors_of_a_matcher_are_timms(name: str) -> None:
    """Names, matcher and factors were stored by timm; the largest power is 36."""
    entry = json.loads(str(TIMM[name]))
    rate = json.loads(str(TIMM["meta"]))["hyper"]["layer_decay"]
    model = Matched(entry["names"], entry["matcher"])
    assert by_name(model, layer_decay(model, rate)) == dict(zip(entry["names"], entry["lr_scale"], strict=True))


class Stub(types.ModuleType):
    """A module in which every name is a class, as far as timm looks at import."""

    __path__: list[str] = []  # noqa: RUF012
    __version__ = "0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


class AnyName(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyName(name, (), {})


STUBS = (
    "huggingface_hub",
    "huggingface_hub.utils",
    "safetensors",
    "safetensors.torch",
    "torchvision",
    "torchvision.datasets",
    "torchvision.datasets.folder",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """timm with stand-ins for what it imports and this test does not use."""
    for name in STUBS:
        stub = Stub(name)
        monkeypatch.setitem(sys.modules, name, stub)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, stub)
    importlib.import_module("timm.optim")
    importlib.import_module("timm.scheduler")
    yield importlib.import_module("timm")
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]


TIMM_MODELS = (
    "vit_tiny_patch16_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "resnet18",
    "efficientnet_b0",
    "cait_xxs24_224",  # its matcher is a function
)


@pytest.mark.requires(modules=["timm"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM_MODELS)
@pytest.mark.parametrize("classes", [0, 10])
def test_factors_of_a_timm_model_are_timms(name: str, classes: int, timm: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.7)
    expected = {param: group["lr_scale"] for group in groups for param in group["params"]}
    assert layer_decay(model, 0.7) == expected


@pytest.mark.requires(modules=["timm"])
@pytest.mark.filterwarnings("ignore")
def test_groups_and_scheduler_of_timm_work_as_they_are(timm: Any, all_native: None) -> None:
    """timm's scheduler multiplies by the key lr_scale of a group; the optimizer leaves that key alone."""
    runs = []
    for optimizer_class in (fused_optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=2)
        groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
        optimizer = optimizer_class(groups, lr=1e-2)
        scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-4)
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
            scheduler.step(step + 1)
        assert len({group["lr"] for group in optimizer.param_groups}) == 5
        runs.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


# Groups ---------------------------------------------------------------------------------------------------------


def grouped(key: str) -> tuple[list[Parameter], list[dict[str, Any]]]:
    """A group a layer and decay, as timm ("lr_scale") and scripts around Hugging Face ("lr") make them."""
    generator = torch.Generator().manual_seed(5)
    params = [Parameter(torch.randn(4, 3, generator=generator)) for _ in range(12)]
    groups = []
    for layer in range(6):
        value = 0.8 ** (5 - layer) * (1e-2 if key == "lr" else 1.0)
        groups.append({"params": [params[2 * layer]], key: value, "weight_decay": 0.1})
        groups.append({"params": [params[2 * layer + 1]], key: value, "weight_decay": 0.0})
    return params, groups


@pytest.mark.parametrize("key", ["lr", "lr_scale"])
def test_groups_of_layers_are_one_launch(key: str, all_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for optimizer_class in (fused_optim.AdamW, torch.optim.AdamW):
        params, groups = grouped(key)
        optimizer = optimizer_class(groups, lr=1e-2)
        calls = []
        if isinstance(optimizer, fused_optim.AdamW):

            def counting(*arguments: Any, calls: Any = calls) -> Any:
                plan = build_plan(*arguments)
                calls.append(len(plan.rows))
                return plan

            monkeypatch.setattr(kept, "build_plan", counting)
        generator = torch.Generator().manual_seed(6)
        for step in range(3):
            if key == "lr_scale":  # what timm's schedulers do
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2 / (step + 1) * group["lr_scale"]
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
        assert calls == ([12] if isinstance(optimizer, fused_optim.AdamW) else [])  # one plan, of all rows
        runs.append([param.detach() for param in params])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["lr", "lr_scale"])
def test_groups_of_layers_equal_factors(key: str) -> None:
    """29 groups or one with factors: the same bits."""
    params, groups = grouped(key)
    if key == "lr_scale":
        for group in groups:
            group["lr"] = 1e-2 * group["lr_scale"]
    others = [Parameter(param.detach().clone()) for param in params]
    factors = [0.8 ** (5 - position // 2) for position in range(12)]
    decays = [1.0 if position % 2 == 0 else 0.0 for position in range(12)]
    one = fused_optim.AdamW(groups, lr=1e-2)
    two = fused_optim.AdamW(others, lr=1e-2, weight_decay=0.1, lr_scale=factors, weight_decay_scale=decays)
    for param, other in zip(params, others, strict=True):
        param.grad = torch.ones_like(param)
        other.grad = torch.ones_like(other)
    one.step()
    two.step()
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))


# Families -------------------------------------------------------------------------------------------------------

# The layer of each name: 0 before the layers, 3 after the two of them.
NAMES: dict[str, dict[str, int]] = {
    "BERT": {
        "bert.embeddings.word_embeddings.weight": 0,
        "bert.embeddings.LayerNorm.bias": 0,
        "bert.encoder.layer.0.attention.self.query.weight": 1,
        "bert.encoder.layer.0.output.LayerNorm.weight": 1,
        "bert.encoder.layer.1.intermediate.dense.bias": 2,
        "bert.pooler.dense.weight": 3,
        "classifier.weight": 3,
    },
    "ELECTRA": {
        "electra.embeddings.position_embeddings.weight": 0,
        "electra.embeddings_project.weight": 0,
        "electra.encoder.layer.0.output.dense.weight": 1,
        "electra.encoder.layer.1.output.dense.weight": 2,
        "discriminator_predictions.dense.weight": 3,
    },
    "DistilBERT": {
        "distilbert.embeddings.word_embeddings.weight": 0,
        "distilbert.transformer.layer.0.attention.q_lin.weight": 1,
        "distilbert.transformer.layer.1.ffn.lin1.weight": 2,
        "pre_classifier.weight": 3,
    },
    "ViT of Hugging Face": {
        "vit.embeddings.cls_token": 0,
        "vit.embeddings.patch_embeddings.projection.weight": 0,
        "vit.encoder.layer.0.attention.attention.query.weight": 1,
        "vit.encoder.layer.1.layernorm_before.weight": 2,
        "vit.layernorm.weight": 3,
        "classifier.weight": 3,
    },
    "GPT-2": {
        "transformer.wte.weight": 0,
        "transformer.wpe.weight": 0,
        "transformer.h.0.attn.c_attn.weight": 1,
        "transformer.h.1.mlp.c_proj.bias": 2,
        "transformer.ln_f.weight": 3,
        "lm_head.weight": 3,
    },
    "GPT-2, bare": {"wte.weight": 0, "h.0.ln_1.weight": 1, "h.1.ln_1.weight": 2, "ln_f.weight": 3},
    "Llama": {
        "model.embed_tokens.weight": 0,
        "model.layers.0.self_attn.q_proj.weight": 1,
        "model.layers.1.block_sparse_moe.experts.0.w1.weight": 2,
        "model.layers.1.mlp.layers.7.weight": 2,
        "model.norm.weight": 3,
        "lm_head.weight": 3,
    },
    "Swin": {
        "patch_embed.proj.weight": 0,
        "absolute_pos_embed": 0,
        "layers.0.blocks.0.attn.qkv.weight": 1,
        "layers.0.downsample.reduction.weight": 1,
        "layers.1.blocks.0.mlp.fc1.weight": 2,
        "norm.weight": 3,
        "head.weight": 3,
    },
    "Swin of Hugging Face": {
        "swin.embeddings.patch_embeddings.projection.weight": 0,
        "swin.encoder.layers.0.blocks.0.attention.self.query.weight": 1,
        "swin.encoder.layers.0.downsample.norm.weight": 1,
        "swin.encoder.layers.1.blocks.0.output.dense.weight": 2,
        "swin.layernorm.weight": 3,
        "classifier.weight": 3,
    },
    "ViT": {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "blocks.0.attn.qkv.weight": 1,
        "blocks.1.mlp.fc1.bias": 2,
        "norm.weight": 3,
        "head.weight": 3,
    },
}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("n_layers", [None, 2, 5])
def test_layers_of_a_family(family: str, n_layers: int | None) -> None:
    model = Model(NAMES[family])
    last = 3 if n_layers is None else n_layers + 1
    expected = {name: 0.5 ** (last - layer) for name, layer in NAMES[family].items()}
    assert by_name(model, layer_decay(model, 0.5, n_layers=n_layers)) == expected
    assert by_name(model, layer_decay(model, 0.5, n_layers=n_layers, layer_id=NAMES[family].__getitem__)) == expected


def test_stages_of_swin_end_with_their_last_block() -> None:
    model = Model(
        [
            "patch_embed.weight",
            *(f"layers.0.blocks.{block}.weight" for block in range(2)),
            "layers.0.downsample.weight",
            *(f"layers.1.blocks.{block}.weight" for block in range(11)),
            "layers.1.downsample.weight",
            "layers.2.blocks.0.weight",
            "head.weight",
        ]
    )
    powers = {name: round(math.log2(1 / value)) for name, value in by_name(model, layer_decay(model, 0.5)).items()}
    assert powers["head.weight"] == 0
    assert powers["layers.2.blocks.0.weight"] == 1
    assert powers["layers.1.downsample.weight"] == powers["layers.1.blocks.10.weight"] == 2
    assert powers["layers.1.blocks.9.weight"] == 3
    assert powers["layers.0.downsample.weight"] == powers["layers.0.blocks.1.weight"] == 13
    assert powers["patch_embed.weight"] == 15


@pytest.mark.parametrize("names", [NAMES["ViT"], None])
@pytest.mark.parametrize(
    "path",
    [
        ("module", "_orig_mod"),
        ("base_model", "model"),  # PEFT's two modules are one wrapper
        ("module", "base_model", "model", "_orig_mod"),
    ],
)
def test_wrapped_model(names: dict[str, int] | None, path: tuple[str, ...]) -> None:
    inner = Model(names) if names else Matched(["a.0", "b"], {"blocks": r"^a\.(\d+)"})
    wrapped: nn.Module = inner
    for name in reversed(path):
        outer = nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    assert layer_decay(wrapped, 0.5) == layer_decay(inner, 0.5)


def test_tied_parameter_has_the_factor_of_its_first_name() -> None:
    model = Model(NAMES["GPT-2"])
    model.get_submodule("lm_head").weight = model.get_parameter("transformer.wte.weight")
    scales = layer_decay(model, 0.5)
    assert scales[model.get_parameter("lm_head.weight")] == 0.5**3
    assert len(scales) == len(NAMES["GPT-2"]) - 1


def test_factors_serve_an_optimizer_without_names() -> None:
    model = Model(NAMES["Llama"])
    optimizer = fused_optim.AdamW(model.parameters(), lr_scale=layer_decay(model, 0.5))
    for param in model.parameters():
        param.grad = torch.ones(1)
    optimizer.step()
    assert [row.lr_scale for row in optimizer.plan.rows] == [0.5 ** (3 - layer) for layer in NAMES["Llama"].values()]


NONE = ["encoder.block.0.weight", "decoder.block.0.weight", "shared.weight"]
TOWERS = ["a.embed_tokens.weight", "a.layers.0.weight", "b.layers.0.weight"]
WRONG: dict[str, tuple[list[str], dict[str, Any], type[Exception], str]] = {
    "no family": (NONE, {}, ValueError, r"Model's parameters are those of no family.*Swin, BERT, GPT-2.*layer_id="),
    "no layers": (["a.weight"], {}, ValueError, "no family"),
    "nothing before the layers": (["layers.0.weight"], {}, ValueError, "no family"),
    "two stacks": (TOWERS, {}, ValueError, r"Model has several stacks of layers, under 'a.', 'b.'.*layer_id="),
    "rate": (NONE, {"decay_rate": -0.5}, ValueError, "decay_rate must be finite and not negative"),
    "rate NaN": (NONE, {"decay_rate": math.nan}, ValueError, "decay_rate must be finite"),
    "n_layers": (NONE, {"n_layers": -1}, ValueError, "n_layers must not be negative"),
    "too few layers": (list(NAMES["ViT"]), {"n_layers": 1}, ValueError, "is in layer 3, beyond n_layers=1"),
    "None": (
        NONE,
        {"layer_id": lambda name: None},
        TypeError,
        "layer_id must give an int for 'encoder.block.0.weight'",
    ),
    "float": (
        NONE,
        {"layer_id": lambda name: 0.5},
        TypeError,
        "must give an int for 'encoder.block.0.weight', got 0.5",
    ),
    "negative": (NONE, {"layer_id": lambda name: -1}, ValueError, "not be negative, got -1 for 'encoder.block"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_layer_decay_refuses(wrong: str) -> None:
    names, options, error, text = WRONG[wrong]
    with pytest.raises(error, match=text):
        layer_decay(Model(names), **{"decay_rate": 0.5, **options})


# Fan-in ---------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = Parameter(torch.empty(nx, nf))


MODULES: dict[str, tuple[nn.Module, dict[str, int]]] = {
    "linear": (nn.Linear(9, 4), {"weight": 9, "bias": 1}),
    "conv1d": (nn.Conv1d(6, 4, 3), {"weight": 18, "bias": 1}),
    "conv2d": (nn.Conv2d(6, 4, (3, 5), bias=False), {"weight": 90}),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3)), {"weight": 12, "bias": 1}),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), {"weight": 27, "bias": 1}),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, bias=False), {"weight": 9}),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), {"weight": 54, "bias": 1}),
    "transposed, grouped": (nn.ConvTranspose1d(6, 4, 5, groups=2), {"weight": 15, "bias": 1}),
    "embedding": (nn.Embedding(10, 4), {"weight": 1}),
    "norm": (nn.LayerNorm(4), {"weight": 1, "bias": 1}),
    "attention": (
        nn.MultiheadAttention(8, 2),
        {"in_proj_weight": 8, "in_proj_bias": 1, "out_proj.weight": 8, "out_proj.bias": 1},
    ),
    "attention of several widths": (
        nn.MultiheadAttention(8, 2, bias=False, kdim=5, vdim=3),
        {"q_proj_weight": 8, "k_proj_weight": 5, "v_proj_weight": 3, "out_proj.weight": 8},
    ),
    "Conv1D": (Conv1D(12, 5), {"weight": 5}),
    "without inputs": (Conv1D(12, 0), {"weight": 1}),
    "own": (Model(["position"]), {"position": 1}),
}


@pytest.mark.parametrize("module", MODULES)
def test_fan_in(module: str) -> None:
    model, fan_in = MODULES[module]
    expected = {name: pytest.approx(1 / math.sqrt(value)) for name, value in fan_in.items()}
    assert by_name(model, fan_in_lr_scale(model)) == expected


@pytest.mark.parametrize("module", [nn.Linear(9, 4), nn.Conv2d(6, 4, (3, 5)), nn.Conv2d(6, 4, 3, groups=2)])
def test_fan_in_is_torchs(module: Any) -> None:
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(module.weight)
    assert fan_in_lr_scale(module)[module.weight] == 1 / math.sqrt(fan_in)


def test_shared_weight_has_the_factor_of_its_first_module() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    assert list(fan_in_lr_scale(nn.Sequential(embedding, head)).values()) == [1.0]
    assert list(fan_in_lr_scale(nn.Sequential(head, embedding)).values()) == [0.5]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet"):
        fan_in_lr_scale(nn.Sequential(nn.LazyLinear(3)))
