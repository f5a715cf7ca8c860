"""GradScaler: torch's, but the inf check of our optimizers is their own read-only pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from .tensors import is_plain


class GradScaler(torch.amp.GradScaler):
    r"""``torch.amp.GradScaler`` that reads the gradients of this library's optimizers once and never writes them.

    torch's scaler looks for infinities before ``optimizer.step()`` by a kernel that also multiplies every gradient and
    writes it back. Here the step looks for them itself, in its reduce phase: together with the norms that a clip or a
    rule needs, in the same pass. What it finds decides about that step on the device, without a synchronisation where
    one CUDA device has all parameters. A step with an infinity or a NaN in any gradient element changes no parameter
    and no state, step counts included; `update` then lowers the scale, as torch's. Only a first step leaves something
    behind: the states that it created, zero, with step counts of 0.

    The division by the scale is inside the update, in its compute type: a 16-bit gradient is not rounded once more, as
    by ``unscale_``. The results are the same bits as with torch's scaler around the same optimizer.

    These go torch's way: an optimizer of another library; ``unscale_`` called by the user, which writes the gradients
    by contract, and the step after it; parameters that are tensor subclasses, such as DTensor, whose other parts are
    with other processes; an optimizer whose ``_step_supports_amp_scaling`` the user has set to False. torch's scaler
    leaves the division to the step of an optimizer made with ``fused=True``, and otherwise unscales in place.

    ``state_dict()`` is torch's, both ways.

    Args:
        device: ``"cuda"`` or ``"cpu"``, where the losses are. Default ``"cuda"``.
        init_scale: the first scale. Default 65536.
        growth_factor: what the scale is multiplied by after ``growth_interval`` steps without infinities, > 1.
            Default 2.
        backoff_factor: what it is multiplied by after a step with one, < 1. Default 0.5.
        growth_interval: in steps. Default 2000.
        enabled: False makes `scale` and `update` do nothing, and `step` the optimizer's. Default True.

    Raises:
        AssertionError: ``growth_factor`` is not above 1, or ``backoff_factor`` not below; a step before `scale`.
        RuntimeError: a second step before `update`, a ``closure=``.

    Example:
        >>> import torch
        >>> import fused_optim
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.AdamW(model.parameters(), grad_clip=fused_optim.ClipGradByGlobalNorm(1.0))
        >>> scaler = fused_optim.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale(model(torch.ones(4, 2)).sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.get_scale()
        1024.0

    References:
        Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018;
        ``torch.amp.GradScaler``.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step the optimizer unless a gradient element is infinite or NaN; see ``torch.amp.GradScaler.step``.

        Args:
            optimizer: whose gradients are those of a loss from `scale`.
            args, kwargs: go to ``optimizer.step``.

        Returns:
            What ``optimizer.step`` does.
        """
        if not self._enabled or "closure" in kwargs or not finds_inf_itself(optimizer):
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if self._scale is None or state["stage"] is not OptState.READY:
            return super().step(optimizer, *args, **kwargs)
        stepped: Any = optimizer  # the attributes are torch's contract, of which Optimizer knows nothing
        of_user: float | Tensor = getattr(stepped, "grad_scale", 1)
        stepped.grad_scale = self._scale * of_user
        stepped.found_inf = torch.zeros((), dtype=torch.float32, device=self._scale.device)
        stepped.finds_inf = True
        try:
            result = optimizer.step(*args, **kwargs)
            state["found_inf_per_device"] = {self._scale.device: stepped.found_inf}
            state["stage"] = OptState.STEPPED
        finally:
            del stepped.grad_scale, stepped.found_inf, stepped.finds_inf
        return result


def finds_inf_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step looks at all of its gradients, and there are any."""
    if not getattr(optimizer, "_step_finds_inf", False):
        return False
    groups = optimizer.param_groups
    if not all(map(is_plain, {type(param) for group in groups for param in group["params"]})):
        return False
    return any(param.grad is not None for group in groups for param in group["params"])
