"""Muon, with AdamW for everything that is no matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from ..optimizer import FusedOptimizer
from ..options.clip import GradClip
from ..options.layers import unwrapped
from ..options.matrices import MatrixOptions, check_flatten, check_matrix, checked_are_matrices, is_matrix
from ..options.options import StateDtype
from ..options.peers import refuse_peer_arguments
from ..options.scales import Scale, ScaleColumn, plain_name
from ..options.texts import explains_options
from ..parameters import Place, parameters
from ..rule.contract import TensorContext
from ..rule.hyperparameters import check_arguments
from ..rule.orthogonal import ADJUSTMENTS, POLYNOMIALS, Iteration, Matrices, Polynomial, adjustment, polynomials_of
from . import adamw

UseMuon = bool | Literal["auto"]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# What AdamW's groups have beside their learning rate, their betas, eps and weight decay.
ADAMW = {"amsgrad": False, "decoupled_weight_decay": True}
# Modules whose weights look up rows: no row of theirs is the image of another.
LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
# The last part of the name of what makes logits, in timm, Hugging Face, fairseq and nanoGPT.
HEADS = ("lm_head", "head", "heads", "classifier", "fc", "score", "output_projection", "unembed", "logits")


def is_adamw(group: dict[str, Any]) -> bool:
    """Whether a group's parameters are AdamW's."""
    return not group.get("use_muon", True)


def prepare(group: dict[str, Any], tensor: TensorContext) -> SimpleNamespace:
    """Per tensor: the scalars that `accumulate` and `direction` read, or AdamW's."""
    if is_adamw(group):
        return adamw.prepare(group, tensor)
    return SimpleNamespace(
        momentum=group["momentum"],
        one_minus_momentum=1 - group["momentum"],
        nesterov=1.0 if group["nesterov"] else 0.0,
        weight_decay=group["weight_decay"] * tensor.weight_decay_scale,
        step_size=group["lr"] * tensor.lr_scale,
    )


def accumulate(grad: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> None:
    """Per element: the new momentum, and the direction that is to be made orthogonal."""
    momentum_buffer = s.momentum * states["momentum_buffer"] + s.one_minus_momentum * grad
    states["momentum_buffer"] = direction = momentum_buffer
    if s.nesterov != 0:
        direction = s.momentum * momentum_buffer + s.one_minus_momentum * grad
    states["direction"] = direction


def direction(param: Tensor, states: dict[str, Tensor], s: SimpleNamespace) -> Tensor:
    """Per element: the direction of the step, from the orthogonal one."""
    if isinstance(s.weight_decay, Tensor) or s.weight_decay != 0:
        return states["direction"] + s.weight_decay * param
    return states["direction"]


@explains_options
class Muon(FusedOptimizer):
    r"""Muon: momentum whose matrices are made orthogonal; takes the place of ``torch.optim.Muon``.

    .. math::

        g_t &= \nabla f_t(\theta_{t-1}) \\
        b_t &= \mu\, b_{t-1} + (1 - \mu)\, g_t \\
        u_t &= \mu\, b_t + (1 - \mu)\, g_t \quad\text{with nesterov, otherwise}\quad b_t \\
        X_0 &= u_t / \max(\lVert u_t \rVert_F, \epsilon), \qquad
            X_k = a_k X_{k-1} + (b_k A + c_k A^2)\, X_{k-1}, \quad A = X_{k-1} X_{k-1}^T \\
        \theta_t &= \theta_{t-1} - \gamma\, (s\, X_K + \lambda\, \theta_{t-1})

    Here :math:`\theta` is ``param``, a matrix of :math:`m` rows and :math:`n` columns; :math:`b` ``momentum_buffer``,
    :math:`\gamma` ``lr``, :math:`\lambda` ``weight_decay``, :math:`\mu` ``momentum``, :math:`\epsilon` ``eps``,
    :math:`K` ``ns_steps``, :math:`(a_k, b_k, c_k)` ``ns_coefficients`` and :math:`s` the factor of ``adjust_lr_fn``. A
    parameter whose ``grad`` is None is left alone.

    Groups with ``use_muon=False`` are :class:`AdamW`'s, in the same plan and at the same step: embeddings, heads,
    biases and the scales of norms. Their keys are ``lr``, ``betas``, ``eps``, ``weight_decay``, ``amsgrad``; what such
    a group does not say, the ``adamw_`` arguments do. :func:`muon_groups` makes the usual split of a model.

    Shapes and dtypes:
        Parameters are float32, float64, bfloat16 or float16. Two dimensions are a matrix; three are a batch of
        matrices, as experts have them; more are flattened from the second on, as convolutions (see ``flatten``). Each
        has the state ``momentum_buffer`` of its own shape and dtype, as in torch. The products are in ``ns_dtype``,
        everything else is computed in float32 (float64 for float64 parameters), and each result is rounded once when
        it is stored. Between steps one buffer of the parameters' size is kept beside the state, in ``ns_dtype``, or in
        float32 where that is float16. The parts of DTensors are brought together at each step, in one process for
        each matrix, and sent back.

    Args:
        lr: learning rate :math:`\gamma \ge 0`; a number or a one-element Tensor. Default 1e-3.
        weight_decay: :math:`\lambda \ge 0`; each step shrinks the parameter by the factor
            :math:`1 - \gamma\lambda`. Default 0.1.
        momentum: :math:`\mu \ge 0`. Default 0.95.
        nesterov: look ahead. Default True.
        ns_coefficients: three numbers for all steps; a sequence of such triples, the last one for all further steps;
            or a name: ``"jordan"`` (the default's numbers), ``"quintic"`` or ``"polar_express"``.
        eps: :math:`\epsilon`, the least norm that a direction is divided by. Default 1e-7.
        ns_steps: :math:`K`, less than 100. Default 5.
        adjust_lr_fn: :math:`s`: ``"original"`` :math:`\sqrt{\max(1, m / n)}`, ``"match_rms_adamw"``
            :math:`0.2 \sqrt{\max(m, n)}`, with which AdamW's learning rate and weight decay serve, or
            ``"spectral_mup"`` :math:`\sqrt{m / n}`. Default None: ``"original"``.
        use_muon: of groups that do not say it themselves. ``"auto"`` makes two groups of a group whose parameters are
            not all matrices: those with two dimensions larger than 1, and AdamW's. Default True.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: hyperparameters of AdamW's groups. Default (0.9, 0.95) and
            1e-8; None: those of Muon.
        heads: into how many equal parts dimension 0 of a parameter is cut, each of which is a matrix by itself, as
            3 times the number of heads for a fused weight of query, key and value; a callable, a mapping or a sequence
            as for ``lr_scale``. Default None: 1.
        flatten: whether parameters of three and more dimensions are one matrix each, of dimension 0 and all others, or
            else batches of matrices of their last two; a group may say it too. Default None: True from four dimensions
            on.
        ns_dtype: dtype of the products: bfloat16, float16, float32 or float64. Default None: bfloat16, as in torch;
            float64 for float64 parameters.

    Raises:
        ValueError: ``lr``, ``weight_decay``, ``momentum`` or ``eps`` out of range; an unknown ``adjust_lr_fn``;
            coefficients that are not three numbers, 100 steps or more (torch's texts); a parameter of less than two
            dimensions, or a complex one, in a group of Muon's; one that cannot be split into its heads; at the first
            step, a DTensor of which nobody can tell which process has which part.
        RuntimeError: at a step, on every process: the processes of a mesh have different parameters or settings, or
            one of them has refused the step.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = fused_optim.Muon(fused_optim.muon_groups(model), lr=0.02, adamw_lr=3e-4)
        >>> model(torch.ones(4, 4)).sum().backward()
        >>> optimizer.step()
        >>> [sorted(optimizer.state[param]) for param in (model[0].weight, model[2].weight)]
        [['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step']]

    References:
        Jordan et al., `Muon: An optimizer for hidden layers in neural networks
        <https://kellerjordan.github.io/posts/muon/>`_, 2024.
        Liu et al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025
        (``match_rms_adamw``).
        Bernstein, `Deriving Muon <https://jeremybernste.in/writing/deriving-muon>`_, 2025 (``spectral_mup``).
        Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025.
    """

    choices = (("adjust_lr_fn", (None, *ADJUSTMENTS)),)
    structural_keys = ("amsgrad", "differentiable")
    keys_of_directions = ("use_muon", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "flatten")
    late_states = ("max_exp_avg_sq",)
    prepare = staticmethod(prepare)
    update = staticmethod(adamw.update)
    accumulate = staticmethod(accumulate)
    direction = staticmethod(direction)

    @refuse_peer_arguments
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Polynomial | tuple[Polynomial, ...] = POLYNOMIALS["jordan"][0],
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        use_muon: UseMuon = True,
        adamw_lr: float | Tensor | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        heads: Scale | None = None,
        flatten: bool | None = None,
        ns_dtype: torch.dtype | None = None,
        maximize: bool = False,
        capturable: bool = False,
        backend: str | None = None,
        lr_scale: Scale | None = None,
        weight_decay_scale: Scale | None = None,
        grad_clip: GradClip | None = None,
        master_weights: str | None = None,
        state_dtype: StateDtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        check_arguments(lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if adjust_lr_fn not in (None, *ADJUSTMENTS):
            raise ValueError(
                f"Adjust learning rate function {adjust_lr_fn} is not supported; take one of {', '.join(ADJUSTMENTS)}"
            )
        polynomials_of(ns_coefficients, ns_steps)
        use_muon = checked_are_matrices(use_muon, "use_muon")
        check_flatten(flatten, "flatten")
        if ns_dtype not in (None, *DTYPES):
            raise ValueError(f"ns_dtype must be one of {', '.join(map(str, DTYPES))}, got {ns_dtype}")
        adamw_lr = lr if adamw_lr is None else adamw_lr
        adamw_weight_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
        check_arguments(lr=adamw_lr, betas=adamw_betas, eps=adamw_eps, weight_decay=adamw_weight_decay)
        others = {"lr": adamw_lr, "betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay, **ADAMW}
        matrices = MatrixOptions(use_muon, others, ScaleColumn("heads", heads), flatten, ns_dtype)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            **{key: True for key, value in (("maximize", maximize), ("capturable", capturable)) if value},
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            lr_scale=lr_scale,
            weight_decay_scale=weight_decay_scale,
            grad_clip=grad_clip,
            master_weights=master_weights,
            state_dtype=state_dtype,
            rounding=rounding,
            seed=seed,
            matrices=matrices,
        )
        places = list(parameters(self.param_groups))
        matrices.heads.resolve([place.named for place in places])
        matrices.resolved = True
        for place in places:
            self.matrices(place)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, of Muon's or of AdamW's; with ``use_muon="auto"`` up to two.

        Raises:
            ValueError: a parameter of Muon's that is no matrix, or a factor that cannot be had; nothing is added.
        """
        before = len(self.param_groups)
        try:
            for group in self._split(param_group):
                super().add_param_group(group)
            for place in parameters(self.param_groups, first=before):
                if self._told.resolved:
                    self.matrices(place)
                elif not is_adamw(place.group):
                    check_matrix(place.param, place.name)
        except Exception:
            del self.param_groups[before:]
            raise

    @property
    def _told(self) -> MatrixOptions:
        assert self.options.matrices is not None
        return self.options.matrices

    def _split(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The groups that a group makes, with AdamW's hyperparameters in those that are its."""
        place = f"param_groups[{len(self.param_groups)}]"
        use_muon = checked_are_matrices(group.get("use_muon", self._told.default), f"{place}['use_muon']")
        check_flatten(group.get("flatten"), f"{place}['flatten']")
        if use_muon == "auto" and not isinstance(group["params"], set):  # which torch refuses
            params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            names = group.get("param_names", ())
            if len(names) == len(params):  # those of another optimizer's group
                params = [(name, entry) if isinstance(entry, Tensor) else entry for name, entry in zip(names, params)]
            are_muons = [_is_matrix(entry, f"{place}['params'][{index}]") for index, entry in enumerate(params)]
            rest = {key: value for key, value in group.items() if key != "param_names"}
            for use in (True, False):
                part = [entry for entry, is_muons in zip(params, are_muons) if is_muons == use]
                if part:
                    yield from self._split({**rest, "params": part, "use_muon": use})
            return
        if "use_muon" in group:
            group["use_muon"] = use_muon
        if use_muon is False:
            group["use_muon"] = False
            for key, value in self._told.others.items():
                group.setdefault(key, value)
        yield group

    def rule(self, group: dict[str, Any]) -> str:
        if is_adamw(group):
            return "amsgrad" if group.get("amsgrad") else "adamw"
        return "muon"

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        if is_adamw(group):
            return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group.get("amsgrad") else 2]
        return ("momentum_buffer",)

    def tensor_state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("step",) if is_adamw(group) else ()

    def matrices(self, place: Place) -> Matrices | None:
        return None if is_adamw(place.group) else self._told.of(place)

    def iteration(self, group: dict[str, Any], matrices: Matrices, dtype: torch.dtype) -> Iteration:
        default = torch.float64 if dtype == torch.float64 else torch.bfloat16
        return Iteration(
            polynomials_of(group["ns_coefficients"], group["ns_steps"]),
            float(group["eps"]),
            adjustment(group["adjust_lr_fn"], matrices.rows, matrices.columns),
            self._told.dtype or default,
        )

    def check_group(self, index: int, group: dict[str, Any], defaults: dict[str, Any], of: str = "") -> None:
        place = f"param_groups[{index}]"
        use_muon = group.get("use_muon", True)
        if checked_are_matrices(use_muon, f"{place}['use_muon']{of}") == "auto":
            raise ValueError(f"{place}['use_muon']{of} must be True or False: 'auto' is for a group that is added")
        check_flatten(group.get("flatten"), f"{place}['flatten']{of}")
        if is_adamw(group):
            defaults = {key: value for key, value in defaults.items() if key in ("maximize", "capturable")}
            super().check_group(index, group, {**defaults, **self._told.others}, of)
            missing = [key for key in self._told.others if key not in group]
            if missing and not of:  # a checkpoint of Keller Jordan's has not all of them: see __setstate__
                raise KeyError(
                    f"{place} has use_muon=False, but not what AdamW's groups have: {', '.join(map(repr, missing))}; "
                    "give it those keys, too, or add its parameters by add_param_group()"
                )
            return
        group = {**defaults, **group}
        try:
            polynomials_of(group["ns_coefficients"], group["ns_steps"])
        except ValueError as error:
            raise ValueError(f"param_groups[{index}]{of}: {error}") from None
        unchecked = ("ns_coefficients", "ns_steps")
        super().check_group(index, group, {key: value for key, value in defaults.items() if key not in unchecked}, of)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self._told.others.items() if is_adamw(group) else ():
                group.setdefault(key, value)  # a checkpoint of Keller Jordan's has not all of them


def muon_groups(model: nn.Module, *, adamw: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The usual split of a model for :class:`Muon`: hidden matrices to Muon, everything else to AdamW.

    AdamW's are: what has less than two dimensions larger than 1 (biases, the scales of norms); the weights of
    ``nn.Embedding`` and ``nn.EmbeddingBag``, and what is tied to them; position embeddings and tokens, whose first size
    is 1; depthwise convolutions; and the head. That is what the model itself says to be it
    (``get_output_embeddings()``, ``get_classifier()``), otherwise modules whose name ends in one of
    ``lm_head, head, heads, classifier, fc, score, output_projection, unembed, logits`` outside of repeated blocks,
    otherwise the last linear layer.

    Args:
        model: the model, which may be wrapped (DistributedDataParallel, ``torch.compile``, FSDP).
        adamw: patterns of the names of further parameters for AdamW, as ``"*.router.weight"``.

    Returns:
        Groups with the parameters' names, in the order in which the model has them: with ``use_muon`` True, one more
        with ``flatten`` for the weights of one-dimensional convolutions, and one with ``use_muon`` False. Empty ones
        are left out.

    Raises:
        ValueError: a pattern matches no parameter.

    Example:
        >>> import torch, fused_optim
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> [group["param_names"] for group in fused_optim.Muon(fused_optim.muon_groups(model)).param_groups]
        [['0.weight', '1.weight'], ['0.bias', '1.bias', '2.weight', '2.bias']]
    """
    own = unwrapped(model)
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for pattern in adamw:
        if not any(fnmatchcase(plain_name(name), pattern) for name in named):
            raise ValueError(f"adamw: the pattern {pattern!r} matches no parameter")
    left_out = {id(param) for module in own.modules() if isinstance(module, LOOKUPS) for param in module.parameters()}
    left_out |= {id(param) for head in _heads_of(own) for param in head.parameters()}
    flat = {id(module.weight) for module in own.modules() if isinstance(module, nn.Conv1d)}
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "use_muon": True},
        "flat": {"params": [], "use_muon": True, "flatten": True},
        "others": {"params": [], "use_muon": False},
    }
    for name, param in named.items():
        is_hidden = is_matrix(param, repr(name)) and param.shape[0] > 1 and (param.ndim == 2 or param.shape[1] > 1)
        by_name = any(fnmatchcase(plain_name(name), pattern) for pattern in adamw)
        kind = "others" if not is_hidden or by_name or id(param) in left_out else "matrices"
        groups["flat" if kind == "matrices" and id(param) in flat else kind]["params"].append((name, param))
    return [group for group in groups.values() if group["params"]]


def _is_matrix(entry: Any, place: str) -> bool:
    """Whether an entry of a group's params is a matrix; of what is no tensor torch says so."""
    name, tensor = (repr(entry[0]), entry[1]) if isinstance(entry, tuple) else (place, entry)
    return not isinstance(tensor, Tensor) or is_matrix(tensor, name)


def _heads_of(model: nn.Module) -> Iterable[nn.Module]:
    for asked in ("get_output_embeddings", "get_classifier"):
        found = getattr(model, asked, None)
        head = found() if callable(found) else None
        if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
            return [head]
    named = [
        module for name, module in model.named_children() if name in HEADS and any(True for _ in module.parameters())
    ]
    return named or [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
