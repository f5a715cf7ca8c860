"""FusedOptimizer: groups, state and step(), the same for every optimizer. Read this first.

One step:

1. `plan.refresh` reads every address, layout and hyperparameter again and reports the rows that need attention:
   no state yet, a gradient of another layout, a parameter that no native backend takes.
2. Those are looked at in Python (`state/states.py`): wrong input is refused before anything has changed, state is
   created or brought into shape; what is still not ready goes to the witness (`eager/parameter.py`), with one log line.
3. `plan.run` updates all other rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import Optimizer, ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import backends
from .arithmetic import Number
from .eager.parameter import MeasuredNorms
from .eager.steps import WitnessSteps
from .norms import Norms, collect_norms
from .options.clip import GLOBAL_NORM, NO_CLIP, NORM, GradClip
from .options.scales import Exclude, Scale, ScaleColumn, column_of, excluded
from .plan.plan import DEVICE_BACKENDS, GRAD_SQ, NORMS, DeviceScalars, Plan, Row, why_not_native, why_refused
from .plan.planner import make_plan
from .shards import Shards, agree, check_placement, settle_grad
from .state import checkpoint, masters, states
from .tensors import is_sharded
from .trust_ratio import TrustRatio


def is_on_device(row: Row) -> bool:
    """Whether kernels step a row without anything waiting for them."""
    return row.native and row.backend in DEVICE_BACKENDS


class FusedOptimizer(torch.optim.Optimizer):
    """Base class of the fused optimizers: a ``torch.optim.Optimizer`` whose step is one plan for all groups.

    A subclass gives the mathematics (`prepare` and `update` for the witness, the name of the C++ rule) and the names
    of its states. It gives no loop, no launcher and no checkpoint code.

    Args:
        params: parameters, groups, or ``named_parameters()``, as ``torch.optim`` takes them.
        defaults: the hyperparameters of a group that names none.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"eager"``; default None: the best for each device, or
            what the environment variable ``FUSED_OPTIM_BACKEND`` names.
        lr_scale, weight_decay_scale: factors of the learning rate and of the weight decay per parameter: a callable
            ``(name, param) -> float``, a mapping by parameter or name pattern, or a sequence in the order of the
            parameters. Default None: 1.0.
        grad_clip: `ClipGradByGlobalNorm`, `ClipGradByNorm` or `ClipGradByValue`; default None: no clipping.
        master_weights: ``"float32"`` keeps a float32 master of each 16-bit parameter in the state, ``"split"`` the 16
            bits that a bfloat16 parameter lacks of it. Default None: none.
        state_dtype: dtype of the element states of 16-bit parameters, as ``torch.float32``; default None: the
            parameter's, as in torch, or float32 where there are master weights.
        exclude: what takes no part in a trust ratio: a callable ``(name, param) -> bool`` or a sequence of name
            patterns.

    Raises:
        ValueError: an unknown backend, one that takes none of the parameters, a ``state_dtype`` or ``master_weights``
            that is none, a factor that is negative or not finite, a pattern that matches nothing, a missing name.
        TypeError: a scale, a factor or a clip of the wrong kind.
        RuntimeError: a forced backend is not available here; the text says why.
    """

    # Group keys that choose the rule or the backend: a change of theirs calls for a new plan.
    structural_keys: ClassVar[tuple[str, ...]] = ("differentiable",)
    # Element states that may be missing in a state that has the others, and then start at zero.
    late_states: ClassVar[tuple[str, ...]] = ()
    # Element states whose first value the first step makes: None, as torch keeps them before it, is none yet.
    states_of_first_step: ClassVar[tuple[str, ...]] = ()
    # The words that a hyperparameter may be.
    choices: ClassVar[tuple[tuple[str, tuple[str, ...]], ...]] = ()
    # Whether there is a lazy_mode.
    takes_sparse: ClassVar[bool] = False
    # The step count of a state that has others but no "step".
    missing_step: ClassVar[float] = 0.0
    prepare: ClassVar[Callable[..., Any]]
    update: ClassVar[Callable[..., Tensor]]
    # A rule whose step length depends on the norm of its own direction has these three instead of `update`.
    has_direction: ClassVar[bool] = False
    accumulate: ClassVar[Callable[..., None]]
    direction: ClassVar[Callable[..., Tensor]]
    scale_direction: ClassVar[Callable[..., Number]]

    # GradScaler sets both for one step and deletes them again (torch's contract); it multiplies by what it finds, so
    # the class must not have them.
    grad_scale: Tensor | None
    found_inf: Tensor | None
    # This library's GradScaler sets it likewise: found_inf is then not read but written, by the step.
    finds_inf: bool = False

    # torch's __getstate__ drops instance attributes: each has its default here.
    _forced_backend: str | None = None
    _state_dtype: torch.dtype | None = None
    _master_weights: str | None = None
    _grad_clip: GradClip | None = None
    _lazy_mode: bool = False
    _scales: tuple[ScaleColumn, ...] = ()  # of lr, of weight_decay; of clipping and of trust ratios (1 or 0)
    _outer_trust_ratio: TrustRatio | None = None  # of what is around this optimizer
    _plan: Plan | None = None
    _rows: Sequence[Row] = ()
    _grad_norm: float | Tensor | None = None
    _witness_norms: dict[int, MeasuredNorms]  # by row, of the last step
    _coalesced: dict[Tensor, Tensor]  # sparse gradients of this step, by parameter
    _measured: dict[torch.device, Tensor]  # where the kernels write the norms of their rows
    _kernel_devices: tuple[torch.device, ...] = ()  # that rows of the plan are on
    _devices_alone: bool = False  # one of them has all rows
    _measures: bool = False  # the rule or a trust ratio asks for norms
    _reduces: bool = False  # norms are needed before the first pass
    _shards: Mapping[torch.device | None, Shards] = MappingProxyType({})  # of each CUDA device and, at None, the host
    _exchanged: dict[torch.device, Tensor]  # norms that processes exchange
    _agreed: str = ""  # what the processes have found to be the same everywhere
    _norm_tensors: dict[torch.device, Tensor]  # where the kernels write the global norm
    _scalars: list[Tensor]
    _found: Sequence[Tensor] = ()  # where the kernels of each CUDA device write found_inf
    _replayed: tuple[Any, ...] = ()  # what the replays of captured steps read and write: never freed before us
    _reported: frozenset[str] = frozenset()
    _loading: dict[str, Any] | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        backend: str | None = None,
        lr_scale: Scale | ScaleColumn | None = None,
        weight_decay_scale: Scale | ScaleColumn | None = None,
        grad_clip: GradClip | None = None,
        master_weights: str | None = None,
        state_dtype: torch.dtype | None = None,
        exclude: Exclude | None = None,
    ) -> None:
        self._forced_backend = backends.requested(backend)
        if state_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"state_dtype={state_dtype} is not torch.float32, torch.bfloat16 or torch.float16")
        masters.check_option(master_weights)
        if grad_clip is not None and not isinstance(grad_clip, GradClip):
            raise TypeError(
                f"grad_clip must be ClipGradByGlobalNorm, ClipGradByNorm or ClipGradByValue, got {grad_clip!r}"
            )
        self._state_dtype = torch.float32 if master_weights is not None and state_dtype is None else state_dtype
        self._master_weights = master_weights
        self._grad_clip = grad_clip
        self._norm_tensors, self._measured, self._exchanged, self._witness_norms, self._coalesced = {}, {}, {}, {}, {}
        super().__init__(params, defaults)
        if self._forced_backend is not None:
            backends.check_forced(self._forced_backend, self._devices())
        named = self._named()
        need_clip = None if grad_clip is None else grad_clip.need_clip
        scales = (
            column_of("lr_scale", lr_scale),
            column_of("weight_decay_scale", weight_decay_scale),
            ScaleColumn("need_clip", need_clip),
            ScaleColumn("exclude", excluded(exclude)),
        )
        for column in scales:
            column.resolve(named)
        for _, place, param in named:
            masters.key_for(param, master_weights, place)
        self._scales = scales

    def _named(self) -> list[tuple[str | None, str, Tensor]]:
        return [
            (states.own_name(group, position), states.name_of(group, index, position), param)
            for index, group in enumerate(self.param_groups)
            for position, param in enumerate(group["params"])
        ]

    def rule(self, group: dict[str, Any]) -> str:
        """The name of the C++ rule that a group follows."""
        raise NotImplementedError

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of a group's states that have one number an element."""
        raise NotImplementedError

    def tensor_state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of a group's states that have one number a tensor."""
        return ("step",)

    def norms(self, group: dict[str, Any]) -> frozenset[str]:
        """Which norms of the gradient `prepare` reads: ``"grad_norm"``, ``"grad_max"``."""
        return frozenset()

    def trust_ratio(self, group: dict[str, Any]) -> TrustRatio | None:
        """The trust ratio of a group, if it has one."""
        return self._outer_trust_ratio

    def attach_trust_ratio(self, trust: TrustRatio, trusted: ScaleColumn) -> None:
        """Take a trust ratio into every step from now on; `LARC` calls this."""
        trusted.resolve(self._named())
        self._outer_trust_ratio, self._scales = trust, (*self._scales[:3], trusted)
        self._plan = None

    def exempt(self, group: dict[str, Any], param: Tensor) -> bool:
        """Whether a parameter has neither trust ratio nor weight decay, whatever the user said."""
        return False

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler leaves the gradients scaled: as in torch with ``fused=True``, or if the user has
        set it. Frameworks that clip between unscaling and step, as Lightning does, refuse an optimizer that says so."""
        return bool(self.__dict__.get("_step_supports_amp_scaling", self.defaults.get("fused")))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    @property
    def _step_finds_inf(self) -> bool:
        """Whether this library's GradScaler leaves them so, unless the user has set the other one to False."""
        return bool(self.__dict__.get("_step_supports_amp_scaling", True))

    def _devices(self) -> set[torch.device]:
        return {param.device for group in self.param_groups for param in group["params"]}

    @property
    def backend(self) -> str:
        """The backend that serves the parameters; for parameters on several devices several, as ``"cpu, cuda"``."""
        return ", ".join(sorted({backends.choose(device, self._forced_backend)[0] for device in self._devices()}))

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The global norm of the gradients at the last step, unscaled and before clipping: a 0-d float32 tensor.

        None before a step with ``grad_clip=ClipGradByGlobalNorm(…)``; ``math.inf`` as its threshold only measures.
        """
        if isinstance(self._grad_norm, Tensor):
            return self._grad_norm.clone()  # the next step writes it again
        return None if self._grad_norm is None else torch.tensor(self._grad_norm, dtype=torch.float32)

    @property
    def last_norms(self) -> Norms | None:
        """Norms of the last step, one number for each parameter that it stepped, on the parameters' device.

        ``grad_norm`` is that of the gradient, unscaled and clipped, before the trust ratio; ``param_norm`` that of the
        parameter before the step; ``trust_ratio`` 1 where there is none. What the step did not measure is NaN. None
        before a step, and for an optimizer that measures nothing. Reading them waits for nothing.
        """
        return collect_norms(self._rows, self._plan, self._witness_norms, self._measured)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters' factors are asked for like those of the constructor.

        Raises:
            ValueError: a factor that cannot be had; the group is not added.
        """
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            for position, param in enumerate(group["params"]):
                place = states.name_of(group, index, position)
                for column in self._scales:
                    column.of(states.own_name(group, position), place, param)
                masters.key_for(param, self._master_weights, place)
        except Exception:  # a function of the user's may raise anything
            if self._scales:
                del self.param_groups[index]
                raise

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}backend: {self.backend}\n)"

    # One step ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError, TypeError, KeyError: a gradient, a state or a hyperparameter that cannot be used. The text
                names the parameter; no parameter, state or step count has changed.
        """
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or profiler._is_profiler_enabled
        ):
            if type(self).step is not FusedOptimizer.step:  # torch has wrapped the subclass's
                return self._plain_step(closure)
            return self._hooked_step() if closure is None else self._hooked_step(closure=closure)
        return self._plain_step(closure)

    # Tells torch not to wrap `step` itself: its wrapper opens a profiler range even where nobody records, which is
    # a tenth of the step of a small model.
    step.hooked = True  # type: ignore[attr-defined]

    def _plain_step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._step_outside_graph()
        else:
            self._step()
        return loss

    _hooked_step = Optimizer.profile_hook_step(_plain_step)

    @torch._disable_dynamo
    def _step_outside_graph(self) -> None:
        self._step()

    def _step(self) -> None:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        self._coalesced.clear()  # of a step that was refused
        if self._plan is None:
            self._build_plan()
        # What only CUDA devices step reads everything there, and nothing waits for them.
        waits = not self._devices_alone
        if waits and found_inf is not None and float(found_inf) != 0:
            return
        # A torch function mode, as torch.set_default_device sets one, would make reading `.grad` 20 times slower.
        with torch._C.DisableTorchFunction():
            attention = self._refresh()
            captured = bool(self._kernel_devices) and self._plan is not None and self._plan.captured()
            if captured:
                self._check_capture(attention)
            witnessed = self._attend(attention) if attention else []
            plan = self._plan
            assert plan is not None
            if not waits and (witnessed or not self._devices_alone):
                waits = True
                if found_inf is not None and float(found_inf) != 0:
                    self._plan = None  # and with it the gradients that it holds
                    return
            finds_inf = self.finds_inf and found_inf is not None
            divisor = 1.0 if scale is None or not waits else float(scale)
            if divisor == 0:  # after many infinities: the gradients are zeros, and no multiple of them is right
                if finds_inf and found_inf is not None:
                    found_inf.fill_(1.0)
                self._plan = None
                return
            grad_scale = 1.0 / divisor
            scalars = self._device_scalars(scale, found_inf, finds_inf) if self._kernel_devices else ()
            clip = NO_CLIP if self._grad_clip is None else self._grad_clip.options
            by_global_norm = clip.kind == GLOBAL_NORM
            threads = torch.get_num_threads()
            shards = self._shards
            witness = WitnessSteps(self, witnessed, grad_scale)
            exchange = partial(self._add_up, witness, waits and by_global_norm) if shards else None
            global_norm: float | None = 0.0 if waits else None
            if by_global_norm and not waits:
                self._grad_norm = self._norm_tensors[self._kernel_devices[0]]
            if (waits and (by_global_norm or finds_inf)) or (shards and self._reduces):
                total = plan.reduce(grad_scale, threads, clip, scalars, exchange, finds_inf)
                if waits and by_global_norm:
                    squares = [total, *witness.squares()]
                    total = math.fsum(squares) if all(map(math.isfinite, squares)) else sum(squares)
                    self._grad_norm = global_norm = math.sqrt(total)
                if waits and finds_inf and self._has_inf(plan, witness):
                    assert found_inf is not None
                    found_inf.fill_(1.0)
                    self._coalesced.clear()
                    self._plan = None  # and with it the gradients that it holds
                    return
            witness.step(global_norm or 0.0, shards.values())
            if captured:
                kept = plan, dict(self._norm_tensors), dict(self._measured), self._scalars
                self._replayed = (*self._replayed, kept)
            plan.run(grad_scale, threads, clip, global_norm, scalars, exchange if self.has_direction else None)
            witness.finish()
            self._witness_norms = witness.measured
            self._coalesced.clear()
            # Writing through addresses leaves the version counters alone; a stale graph must still raise.
            torch._C._increment_version(plan.touched())
            if finds_inf and not waits and found_inf is not self._found[0]:
                assert found_inf is not None
                found_inf.copy_(self._found[0], non_blocking=True)

    def _has_inf(self, plan: Plan, witness: WitnessSteps) -> bool:
        """Whether the reduce phase, or a gradient that the witness steps, has met an element that is not finite."""
        return plan.non_finite() or any(found.item() != 0 for found in self._found) or witness.non_finite()

    def _device_scalars(self, scale: Tensor | None, found_inf: Tensor | None, finds_inf: bool) -> list[DeviceScalars]:
        """For each CUDA device where the kernels read the loss scale and found_inf and write norms, or found_inf."""
        scalars = []
        self._scalars = []  # alive until the next step: the kernels read them later
        self._found = []
        for device in self._kernel_devices:
            scale_address, found_inf_address = (self._address_on(device, value) for value in (scale, found_inf))
            written = 0
            if finds_inf and found_inf is not None:
                self._found.append(found_inf.to(device))  # itself, where it is there
                self._scalars.append(self._found[-1])
                written, found_inf_address = self._found[-1].data_ptr(), 0
            if device not in self._norm_tensors:
                self._norm_tensors[device] = torch.zeros((), dtype=torch.float32, device=device)
            norm = self._norm_tensors[device].data_ptr()
            exchanged = self._exchanged[device].data_ptr() if device in self._shards else 0
            measured = self._measured_on(device)
            scalars.append((device.index or 0, scale_address, found_inf_address, norm, written, measured, exchanged))
        return scalars

    def _add_up(self, witness: WitnessSteps, total: bool, norms: Any) -> float:
        """Add up over processes the norms on the host, or those on a CUDA device by its index; see `plan.Exchange`.

        ``total``: whether the host wants the device's sum of squares, for which it waits.
        """
        if not isinstance(norms, int):
            if None not in self._shards:
                return 0.0
            return witness.exchange(torch.frombuffer(norms, dtype=torch.float64).view(-1, NORMS), self._shards[None])
        device = next(device for device in self._kernel_devices if (device.index or 0) == norms)
        table = self._exchanged[device]
        witness.exchange(table, self._shards[device])
        clipped = [row.clipped for row in self._rows_on(device)]
        return float(table[clipped, GRAD_SQ].sum()) if total else 0.0

    def _measured_on(self, device: torch.device) -> int:
        """Where a device's kernels write the norms of its rows; 0 if this optimizer measures nothing."""
        if not self._measures:
            return 0
        rows = len(self._rows_on(device))
        if device not in self._measured or len(self._measured[device]) != rows:
            self._measured[device] = torch.full((rows, 3), math.nan, dtype=torch.float32, device=device)
        return self._measured[device].data_ptr()

    def _rows_on(self, device: torch.device) -> list[Row]:
        """Those that a CUDA device's kernels step, in the order of their tables there."""
        return [row for row in self._rows if is_on_device(row) and row.param.device == device]

    def _address_on(self, device: torch.device, value: Tensor | None) -> int:
        """Where a kernel on a device finds a number, as float32; 0: there is none."""
        if value is None:
            return 0
        whole: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
        value = whole.detach().to(device=device, dtype=torch.float32, non_blocking=True).resolve_neg()
        self._scalars.append(value)
        return value.data_ptr()

    def _check_capture(self, attention: Sequence[tuple[int, str]]) -> None:
        """Refuse a capture into a CUDA graph that could not be replayed.

        Raises:
            RuntimeError: a group is not capturable, or a parameter is not ready; the text names it and the remedy.
        """
        name = type(self).__name__
        if self._shards:
            raise RuntimeError(
                f"{name}.step() is being captured into a CUDA graph, but its parameters are shards whose norms several "
                "processes add up at each step; step outside of the graph"
            )
        for index, group in enumerate(self.param_groups):
            if not group.get("capturable", False):
                raise RuntimeError(
                    f"{name}.step() is being captured into a CUDA graph, but param_groups[{index}]['capturable'] is "
                    f"False; make the optimizer with {name}(..., capturable=True)"
                )
        for index, _ in attention:
            row = self._rows[index]
            raise RuntimeError(
                f"{name}.step() is being captured into a CUDA graph, but {row.name} is not ready: "
                f"{row.refused or 'its state or its gradient is not what the kernels read'}; take one step with a "
                "gradient for it before the capture, or leave it without a gradient"
            )

    def _refresh(self) -> Sequence[tuple[int, str]]:
        for _ in range(2):
            if self._plan is None:
                self._build_plan()
            assert self._plan is not None
            attention = self._plan.refresh(self.param_groups, self.state)
            if attention is not None and all(self._is_current(index) for index, kind in attention if kind == "param"):
                return attention
            self._plan = None
        raise RuntimeError(
            "the param groups change while the plan is built from them, or are not a list of dicts whose 'params' are "
            "lists"
        )

    def _is_current(self, index: int) -> bool:
        """Whether a row that the eager path takes still is what the plan was built for."""
        row = self._rows[index]
        group = {**self.defaults, **self.param_groups[row.group]}
        return (row.param.dtype, row.param.device) == (row.dtype, row.device) and (
            row.refused == why_not_native(row.param, group, row.backend)
        )

    def _build_plan(self) -> None:
        present = {param for group in self.param_groups for param in group["params"]}
        for column in self._scales:
            column.forget_all_but(present)
        groups = [{**self.defaults, **group} for group in self.param_groups]
        rows = []
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                backend, passed_over = backends.choose(param.device, self._forced_backend)
                if passed_over is not None:
                    self._report(f"parameters on {param.device}", passed_over, served_by=backend)
                place = states.name_of(group, index, position)
                if is_sharded(param):
                    check_placement(param, place)
                refused = why_not_native(param, group, backend)
                lr_scale, weight_decay_scale, clipped, trusted = (
                    column.of(states.own_name(group, position), place, param) for column in self._scales
                )
                if self.exempt(group, param):
                    weight_decay_scale = trusted = 0.0
                rows.append(
                    Row(
                        group=index,
                        param=param,
                        lr_scale=lr_scale,
                        weight_decay_scale=weight_decay_scale,
                        native=refused is None,
                        clipped=clipped != 0,
                        trusted=trusted != 0,
                        master=masters.key_for(param, self._master_weights, place),
                        dtype=param.dtype,
                        device=param.device,
                        name=place,
                        backend=backend,
                        refused=refused,
                        own_name=states.own_name(group, position),
                    )
                )
        self._rows = rows
        self._kernel_devices = tuple(dict.fromkeys(row.param.device for row in rows if is_on_device(row)))
        self._devices_alone = len(self._kernel_devices) == 1 and all(map(is_on_device, rows))
        rules = [self.rule(group) for group in groups]
        trusts = any(self.trust_ratio(group) is not None for group in groups)
        self._measures = trusts or self.has_direction or any(self.norms(group) for group in groups)
        clip = NO_CLIP if self._grad_clip is None else self._grad_clip.options
        self._reduces = clip.kind in (GLOBAL_NORM, NORM) or trusts or any(self.norms(group) for group in groups)
        self._shards = self._shards_of(groups, rules) if self._reduces or self._measures else {}
        trust_ratio = self.trust_ratio if trusts else None
        self._plan = make_plan(rows, rules, groups, self.defaults, self.structural_keys, trust_ratio)

    def _shards_of(self, groups: Sequence[dict[str, Any]], rules: Sequence[str]) -> dict[torch.device | None, Shards]:
        """What is exchanged between processes; a collective where there is something."""
        if not any(is_sharded(row.param) for row in self._rows):
            return {}
        self._agreed = agree(self._rows, rules, self._agreed)
        takes_maximum = any("grad_max" in self.norms(group) for group in groups)
        on_device = list(map(is_on_device, self._rows))
        on_host = {index: index for index in range(len(self._rows)) if not on_device[index]}
        total_only = not self._measures  # only a global norm or the norm of each gradient is left
        total_only = total_only and self._grad_clip is not None and self._grad_clip.options.kind == GLOBAL_NORM
        shards: dict[torch.device | None, Shards] = {
            None: Shards(self._rows, on_host, torch.device("cpu"), total_only=total_only, takes_maximum=takes_maximum)
        }
        for device in self._kernel_devices:
            indices = [i for i, row in enumerate(self._rows) if on_device[i] and row.param.device == device]
            positions = {index: position for position, index in enumerate(indices)}
            shards[device] = Shards(self._rows, positions, device, total_only=False, takes_maximum=takes_maximum)
            self._exchanged[device] = torch.zeros(len(indices), NORMS + 1, dtype=torch.float64, device=device)
        return {device: of_table for device, of_table in shards.items() if of_table}

    def refresh_masters(self) -> None:
        """Rebuild every master weight from its parameter: what it held below the parameter's precision is forgotten.

        No step needs this: an element that was written, through ``param.data`` too, counts as it is.
        """
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                key = masters.key_for(param, self._master_weights, states.name_of(group, index, position))
                if key is not None and key in self.state.get(param, {}):
                    self.state[param][key] = masters.build(param, key)

    def _attend(self, attention: Sequence[tuple[int, str]]) -> list[int]:
        """Refuse or repair the state of rows that need attention; return those that the witness takes."""
        groups = [{**self.defaults, **group} for group in self.param_groups]
        rows = [self._rows[index] for index, _ in attention]
        for index in {row.group for row in rows}:
            states.check_hyperparameters(groups[index], index, self)
        for row in rows:
            states.check_grad(row, self, groups[row.group])
            states.check_state(row, self.state.get(row.param), groups[row.group], self)
        taken: dict[int, Tensor] = {}
        for row in rows:
            lay = settle_grad(row.param)
            if lay is not None:
                self._log_once(
                    "placement",
                    "%s: the gradient of %s lay as %s, and was redistributed to where the parameter is",
                    type(self).__name__,
                    row.name,
                    lay,
                )
            states.repair_state(row, self.state, groups[row.group], self, taken)
        left = self._refresh()
        for index, kind in left:
            row = self._rows[index]
            if row.backend != "eager":
                self._report(row.name, row.refused or why_refused(row, kind), kind=row.refused or kind)
            grad = row.param.grad
            if grad is not None and grad.is_sparse:
                self._coalesced[row.param] = grad.detach().coalesce()
        return [index for index, _ in left]

    def _report(self, what: str, reason: str, kind: str | None = None, served_by: str = "eager") -> None:
        """One log line for each kind of fallback of this optimizer."""
        path = "eager path" if served_by == "eager" else f"{served_by} backend"
        self._log_once(kind or reason, "%s: the %s serves %s: %s", type(self).__name__, path, what, reason)

    def _log_once(self, kind: str, message: str, *arguments: str) -> None:
        if kind not in self._reported:
            self._reported = self._reported | {kind}
            backends.logger.warning(message, *arguments)

    # Checkpoints ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the groups in torch's form, with torch's keys.

        Where a factor of ``lr_scale`` or ``weight_decay_scale`` is not 1, one top-level key more,
        ``fused_optim_scales``, holds those factors. They are not loaded: it serves `load_state_dict` to warn in the log
        if the run goes on with others. ``torch.optim`` ignores it.
        """
        state_dict = super().state_dict()
        checkpoint.remember_scales(self, state_dict)
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, of its ``torch.optim`` namesake, apex's FusedAdam or DeepSpeed's.

        Unlike torch's, it keeps the dtype of every state tensor and shares no memory with ``state_dict``, so that
        a resumed run equals the uninterrupted one bit for bit.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: something is missing or of another shape; the text names it, and the optimizer is unchanged.
        """
        # torch calls pre-hooks in the order of registration: this one sees what the others made of the dict.
        handle = self.register_load_state_dict_pre_hook(checkpoint.admit)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_forced_backend": self._forced_backend,
            "_state_dtype": self._state_dtype,
            "_master_weights": self._master_weights,
            "_grad_clip": self._grad_clip,
            "_lazy_mode": self._lazy_mode,
            "_scales": self._scales,
            "_outer_trust_ratio": self._outer_trust_ratio,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self._norm_tensors, self._measured, self._exchanged, self._witness_norms, self._coalesced = {}, {}, {}, {}, {}
        self._rows = ()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if self._loading is not None:
            checkpoint.restore(self, self._loading)
