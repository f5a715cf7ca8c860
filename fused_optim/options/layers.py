"""Factors of the learning rate that a model's layers give: layer-wise decay, and LeCun's fan-in rule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from torch import nn
from torch.nn import Parameter

from .scales import WRAPPERS, plain_name

LayerId = Callable[[str], int]


class Family(NamedTuple):
    """How the models of a family name their layers.

    ``block`` has one group, the layer's number, or two, stage and block. ``closing`` is what ends the stage of its
    group. What neither these nor ``stem`` match is the head.
    """

    name: str
    block: re.Pattern[str]
    stem: re.Pattern[str]
    closing: re.Pattern[str] | None = None


def _family(name: str, block: str, stem: str, closing: str | None = None) -> Family:
    above = r"(?:.*?\.)?"  # lazy: a layer may hold numbered layers of its own
    return Family(
        name,
        re.compile(rf"(?P<stack>{above}){block}\."),
        re.compile(rf"{above}(?:{stem})(?:\.|$)"),
        None if closing is None else re.compile(rf"{above}{closing}\."),
    )


# The first that fits counts: Swin's `layers.0.blocks.1` also reads as Llama's and as ViT's.
FAMILIES = (
    _family(
        "Swin",
        r"layers\.(\d+)\.blocks\.(\d+)",
        "patch_embed|absolute_pos_embed|mask_token|embeddings",
        r"layers\.(\d+)\.downsample",
    ),
    _family("BERT", r"(?:encoder|transformer)\.layer\.(\d+)", "embeddings|embeddings_project"),
    _family("GPT-2", r"h\.(\d+)", "wte|wpe"),
    _family("Llama", r"layers\.(\d+)", "embed_tokens"),
    _family(
        "ViT",
        r"blocks\.(\d+)",
        r"cls_token|dist_token|mask_token|reg_token|register_tokens|\w*pos_embed\w*|position\w*|patch_embed\w*",
    ),
)


def layer_decay(
    model: nn.Module, decay_rate: float, *, n_layers: int | None = None, layer_id: LayerId | None = None
) -> dict[Parameter, float]:
    r"""Layer-wise learning rate decay as factors, for ``lr_scale=``.

    .. math::
        r = \alpha^{\,n + 1 - i}

    Here :math:`\alpha` is ``decay_rate``, :math:`n` the number of layers, and :math:`i` the parameter's layer: 0 for
    embeddings and what else comes before the layers, 1 to :math:`n` for the layers, :math:`n + 1` for the rest: the
    head, and a norm before it.

    The layers are found by name, in this order:

    * by ``layer_id``, where it is given;
    * by the model's own ``group_matcher()``, which timm's models have; the factors are then those of timm's
      ``param_groups_layer_decay``, which counts a norm before the head to the topmost layer;
    * as models of these families name them: BERT (``encoder.layer.0``; also RoBERTa, ELECTRA, DistilBERT, ViT of
      Hugging Face), GPT-2 (``h.0``), Llama (``layers.0`` beside ``embed_tokens``), Swin (``layers.0.blocks.0``), ViT
      (``blocks.0``). What ends a stage of Swin belongs to the stage's last block.

    A parameter that stands in several places of the model has the factor of the first of its names, as in
    ``named_parameters()``: an output layer that is tied to the embedding decays as the embedding does.

    Args:
        model: the model, which may be wrapped (DistributedDataParallel, ``torch.compile``, FSDP).
        decay_rate: :math:`\alpha`, finite, 0 or more; commonly 0.65 to 0.95.
        n_layers: :math:`n`. Default None: as many as are found, and the topmost layer found, with timm's matcher and
            with ``layer_id``, has the factor 1.
        layer_id: ``(name) -> int``, the layer :math:`i` of a parameter.

    Returns:
        A factor for each parameter of the model.

    Raises:
        ValueError: the names fit no family, or several stacks of layers; a layer is negative or beyond ``n_layers``;
            ``decay_rate`` or ``n_layers`` out of range.
        TypeError: ``layer_id`` gives no int for a parameter.

    Example:
        >>> import torch, fused_optim
        >>> model = torch.nn.ModuleDict({
        ...     "patch_embed": torch.nn.Linear(4, 8),
        ...     "blocks": torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2)),
        ...     "head": torch.nn.Linear(8, 2),
        ... })
        >>> scales = fused_optim.layer_decay(model, 0.5)
        >>> {name: scales[param] for name, param in model.named_parameters() if name.endswith("weight")}
        {'patch_embed.weight': 0.125, 'blocks.0.weight': 0.25, 'blocks.1.weight': 0.5, 'head.weight': 1.0}
        >>> optimizer = fused_optim.AdamW(model.parameters(), lr=1e-3, lr_scale=scales)
    """
    rate = float(decay_rate)
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"decay_rate must be finite and not negative, got {decay_rate}")
    if n_layers is not None and n_layers < 0:
        raise ValueError(f"n_layers must not be negative, got {n_layers}")
    params = {plain_name(name): param for name, param in model.named_parameters()}
    matcher = getattr(unwrapped(model), "group_matcher", None)
    if layer_id is not None:
        ids = {name: _checked_id(layer_id(name), name) for name in params}
        last = max(ids.values(), default=0)
    elif matcher is not None:
        ids = matched_ids(params, matcher(coarse=False))
        last = max(ids.values(), default=0)
    else:
        ids, last = family_ids(params, type(unwrapped(model)).__name__)
    if n_layers is not None:
        last = n_layers + 1
        for name, layer in ids.items():
            if layer > last:
                raise ValueError(
                    f"{name!r} is in layer {layer}, beyond n_layers={n_layers}, whose head is layer {last}; give "
                    "n_layers the number of the model's layers, or leave it out"
                )
    return {param: rate ** (last - ids[name]) for name, param in params.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside of wrappers, each of which has one child, and that child perhaps one."""
    names, inner = "", model
    while len(inner._modules) == 1:
        ((name, child),) = inner._modules.items()
        if child is None or not any(wrapper.startswith(f"{names}{name}.") for wrapper in WRAPPERS):
            break
        names, inner = f"{names}{name}.", child
        if names in WRAPPERS:
            names, model = "", inner
    return model


def _checked_id(value: Any, name: str) -> int:
    if not isinstance(value, Integral):
        raise TypeError(f"layer_id must give an int for {name!r}, got {value!r}")
    if value < 0:
        raise ValueError(f"layer_id must not be negative, got {value} for {name!r}")
    return int(value)


def family_ids(names: Iterable[str], model: str) -> tuple[dict[str, int], int]:
    """The layer of each name by the first family that fits, and the head's layer.

    Raises:
        ValueError: none fits.
    """
    names = list(names)
    for family in FAMILIES:
        places = {name: match for name in names if (match := family.block.match(name)) is not None}
        if not places or not any(family.stem.match(name) for name in names):
            continue
        stacks = sorted({match["stack"] for match in places.values()})
        if len(stacks) > 1:
            raise ValueError(
                f"{model} has several stacks of layers, under {', '.join(map(repr, stacks))}; say which layer a "
                "parameter belongs to with layer_id=, a function (name) -> int"
            )
        layers = {name: tuple(map(int, match.groups()[1:])) for name, match in places.items()}
        order = {layer: position for position, layer in enumerate(sorted(set(layers.values())), 1)}
        ids = dict.fromkeys(names, len(order) + 1)
        ids |= {name: 0 for name in names if family.stem.match(name)}
        ids |= {name: order[layer] for name, layer in layers.items()}
        for name in names:
            if family.closing is not None and (match := family.closing.match(name)) is not None:
                ids[name] = max(position for layer, position in order.items() if layer[0] == int(match[1]))
        return ids, len(order) + 1
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(
        f"the names of {model}'s parameters are those of no family that layer_decay knows ({known}), and it has no "
        "group_matcher() as timm's models have; say which layer a parameter belongs to with layer_id=, a function "
        f"(name) -> int; its names are {', '.join(names[:3])}, ..."
    )


def matched_ids(names: Iterable[str], matcher: Mapping[str, Any] | Callable[[str], Any]) -> dict[str, int]:
    """The layer of each name by a matcher of timm's.

    A dict of patterns: where one matches, the position in the dict and the numbers in the name are the place, and
    equal places are a layer. A suffix of 99999 joins the layer before. What nothing matches comes last.
    """
    joins_previous = 99999
    places: dict[str, tuple[float, ...]] = {}
    if callable(matcher):
        for name in names:
            place = matcher(name)
            places[name] = tuple(place) if isinstance(place, Iterable) else (place,)
    else:
        patterns: list[tuple[re.Pattern[str], int, Sequence[int]]] = []
        for position, entry in enumerate(matcher.values()):
            for pattern, suffix in [(entry, None)] if isinstance(entry, str) else entry or ():
                patterns.append((re.compile(pattern), position, suffix or ()))
        for name in names:
            places[name] = (math.inf,)
            for compiled, position, suffix in patterns:
                if match := compiled.match(name):
                    numbers = (group for group in match.groups() if group is not None)
                    places[name] = (float(position), *map(float, numbers), *map(float, suffix))
                    break
    layer, layers = -1, {}
    for place in sorted(set(places.values())):
        if layer < 0 or place[-1] != joins_previous:
            layer += 1
        layers[place] = layer
    return {name: layers[place] for name, place in places.items()}


def fan_in_lr_scale(model: nn.Module) -> dict[Parameter, float]:
    r"""LeCun's rule as factors, for ``lr_scale=``: each weight's rate falls with the inputs that it sums.

    .. math::
        r = \frac{1}{\sqrt{\text{fan-in}}}

    ==========================================  ==========================================================
    weight of                                   fan-in
    ==========================================  ==========================================================
    ``Linear``                                  ``in_features``
    ``Conv1d``, ``Conv2d``, ``Conv3d``          ``in_channels / groups`` times the kernel's elements
    ``ConvTranspose1d``, ``2d``, ``3d``         ``in_channels / groups`` times the kernel's elements
    ``MultiheadAttention``                      the width that each projection reads
    ``Conv1D`` of Hugging Face (GPT-2)          ``nx``
    ``Embedding`` and all else                  1: biases, norms, positions and parameters of other modules
    ==========================================  ==========================================================

    An embedding's input has one element that is not 0. The other modules' parameters do not say which of their
    dimensions is summed. A parameter that several modules share has the factor of the first of them, in the order of
    ``model.modules()``.

    Args:
        model: the model.

    Returns:
        A factor for each parameter of the model.

    Raises:
        ValueError: a lazy module has not yet seen an input.

    Example:
        >>> import torch, fused_optim
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 4), torch.nn.Flatten(), torch.nn.Linear(16, 2))
        >>> list(fused_optim.fan_in_lr_scale(model).values())
        [0.125, 1.0, 0.25, 1.0]

    References:
        LeCun et al., `Efficient BackProp <http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf>`_, 1998, section 4.7.
    """
    factors: dict[Parameter, float] = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if nn.parameter.is_lazy(param):
                raise ValueError(
                    f"{f'{path}.{name}'.lstrip('.')!r} has no shape yet; let the model see an input before "
                    "fan_in_lr_scale"
                )
            if param not in factors:
                factors[param] = 1 / math.sqrt(_fan_in(module, name, param) or 1)
    return factors


def _fan_in(module: nn.Module, name: str, param: Parameter) -> int:
    if isinstance(module, nn.MultiheadAttention):
        return param.shape[1] if name.endswith("proj_weight") else 1
    if name != "weight":
        return 1
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return param.shape[0] // module.groups * math.prod(param.shape[2:])
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return math.prod(param.shape[1:])
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # Hugging Face's; a Linear, transposed
        return param.shape[0]
    return 1
