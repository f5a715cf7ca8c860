"""FusedOptimizer: groups, state and step(), the same for every optimizer. Read this first.

One step, `_step` below:

1. `plan.refresh` reads every address, layout and hyperparameter again and reports the rows that cannot be stepped as
   they are: no state yet, a gradient of another layout, a parameter that no native backend takes.
2. Those are looked at in Python (`kept.py`, `plan/readiness.py`): wrong input is refused before anything has changed,
   state is created or brought into shape; what is still not ready goes to the eager path (`eager/`), with one log line.
3. `plan.apply` updates all other rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim.optimizer import Optimizer, ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .backends import choice
from .eager.steps import NO_STEPS, EagerSteps
from .kept import Kept
from .norms import LastStep, Norms, global_norm
from .options.clip import GLOBAL_NORM, GradClip
from .options.matrices import MatrixOptions
from .options.options import Factors, Options, StateDtype
from .options.scales import Exclude, Scale, ScaleColumn
from .parameters import parameters
from .plan.built_plan import BuiltPlan
from .plan.loss_scale import LossScale
from .plan.planner import check_flattened
from .plan.shards import Exchange
from .plan.step import Step
from .rule.contract import Rule
from .rule.trust_ratio import TrustRatio
from .state import checkpoint, formats, masters
from .tensors import is_flattened, lasting


class FusedOptimizer(Rule, torch.optim.Optimizer):
    """Base class of the fused optimizers: a ``torch.optim.Optimizer`` whose step is one plan for all groups.

    A subclass gives the mathematics (`prepare` and `update` for the eager path, the name of the C++ rule) and the names
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
            bits that a bfloat16 parameter lacks of it, ``"split8"`` the upper 8 of them. Default None: none.
        state_dtype: how the element states are kept: a dtype, ``"8bit"``, or a mapping to those by the names of
            states; default None: in the parameter's dtype, as in torch, or float32 where there are master weights.
        rounding: how what is stored in 16 bits is rounded: ``"nearest"`` or ``"stochastic"``.
        seed: of all random words, an integer of 32 bits.
        exclude: what takes no part in a trust ratio: a callable ``(name, param) -> bool`` or a sequence of name
            patterns.
        matrices: which parameters are matrices, and how. Default None: there are none.

    Raises:
        ValueError: an unknown backend, one that takes none of the parameters; another ``state_dtype``,
            ``master_weights``, ``rounding`` or ``seed`` than those; a factor that is negative or not finite, a pattern
            that matches nothing, a missing name.
        TypeError: a scale, a factor or a clip of the wrong kind.
        RuntimeError: a forced backend is not available here; the text says why.
    """

    # GradScaler sets both for one step and deletes them again (torch's contract); it multiplies by what it finds, so
    # the class must not have them.
    grad_scale: Tensor | None
    found_inf: Tensor | None
    # This library's GradScaler sets it likewise: found_inf is then not read but written, by the step.
    finds_inf: bool = False

    _kept: Kept

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
        state_dtype: StateDtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        exclude: Exclude | None = None,
        lazy_mode: bool = False,
        matrices: MatrixOptions | None = None,
    ) -> None:
        forced = choice.requested(backend)
        masters.check_option(master_weights)
        options = Options.of_arguments(
            backend=forced,
            state_dtype=state_dtype,
            master_weights=master_weights,
            rounding=rounding,
            seed=seed,
            grad_clip=grad_clip,
            lazy_mode=lazy_mode,
            matrices=matrices,
        )
        self._kept = Kept(options, type(self).__name__)
        super().__init__(params, defaults)
        if forced is not None:
            choice.check_forced(forced, self._devices())
        places = list(parameters(self.param_groups))
        factors = Factors.of_arguments(lr_scale, weight_decay_scale, grad_clip, exclude)
        factors.resolve(places)
        masters_of = [masters.key_for(place.param, master_weights, place.name) for place in places]
        if master_weights is not None and not any(masters_of):
            what = f"master_weights={master_weights!r} has no effect: no parameter is float16 or bfloat16"
            self._kept.log.once("master_weights", "%s: %s", what)
        options.factors = factors
        formats.check_names(self.param_groups, defaults, self, options)
        formats.say_what_is_wider(places, defaults, self, options, self._kept.log)
        formats.say_rounding_without_effect(places, defaults, self, options, self._kept.log)
        for place in places:
            check_flattened(place, self, options)
        self._kept.built = True

    @property
    def options(self) -> Options:
        """What the constructor was told beyond hyperparameters."""
        return self._kept.options

    @property
    def plan(self) -> BuiltPlan | None:
        """The plan of the last step; None before it, and after what calls for a new one."""
        return self._kept.plan

    def trust_ratio(self, group: dict[str, Any]) -> TrustRatio | None:
        return self.options.trust_ratio

    def attach_trust_ratio(self, trust: TrustRatio, has_trust_ratio: ScaleColumn) -> None:
        """Take a trust ratio, and who has one, into every step from now on; `LARC` calls this."""
        self.options.trust_ratio, self.options.factors.has_trust_ratio = trust, has_trust_ratio
        self._kept.plan = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler leaves the gradients scaled: as in torch with ``fused=True``, or if the user has
        set it. Frameworks that clip between unscaling and step, as Lightning does, refuse an optimizer that says so."""
        chosen = self._kept.supports_scaling
        return bool(self.defaults.get("fused") if chosen is None else chosen) and not self._is_flattened()

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._kept.supports_scaling = value

    @property
    def _step_finds_inf(self) -> bool:
        """Whether this library's GradScaler leaves them so, unless the user has set the other one to False."""
        return self._kept.supports_scaling is not False and not self._is_flattened()

    def _is_flattened(self) -> bool:
        """Whether FSDP1 has flattened a parameter: only ShardedGradScaler knows of an infinity in another's shard."""
        if self._kept.plan is not None:
            return self._kept.plan.flattened
        return any(is_flattened(place.param) for place in parameters(self.param_groups))

    def _devices(self) -> set[torch.device]:
        return {param.device for group in self.param_groups for param in group["params"]}

    @property
    def backend(self) -> str:
        """The backend that serves the parameters; for parameters on several devices several, as ``"cpu, cuda"``."""
        return ", ".join(sorted({choice.choose(device, self.options.backend)[0] for device in self._devices()}))

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The global norm of the gradients at the last step, unscaled and before clipping: a 0-d float32 tensor.

        None before a step with ``grad_clip=ClipGradByGlobalNorm(…)``; ``math.inf`` as its threshold only measures.
        """
        return None if self._kept.last is None else self._kept.last.grad_norm()

    @property
    def last_norms(self) -> Norms | None:
        """Norms of the last step, one number for each parameter that it stepped, on the parameters' device.

        ``grad_norm`` is that of the gradient, unscaled and clipped, before the trust ratio; ``param_norm`` that of the
        parameter before the step; ``trust_ratio`` 1 where there is none. What the step did not measure is NaN. None
        before a step, and for an optimizer that measures nothing. Reading them waits for nothing.
        """
        return None if self._kept.last is None else self._kept.last.norms()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters' factors are asked for like those of the constructor.

        Raises:
            ValueError: a factor that cannot be had; the group is not added.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            for place in parameters(self.param_groups, first=index):
                self.options.factors.of(place)
                masters.key_for(place.param, self.options.master_weights, place.name)
                formats.why_wider("", place.param, self.options, place.name)
        except Exception:  # a function of the user's may raise anything
            del self.param_groups[index]
            raise
        if self._kept.built:
            places = parameters(self.param_groups, first=index)
            formats.say_what_is_wider(places, self.defaults, self, self.options, self._kept.log)

    def __repr__(self) -> str:
        forced = " (forced)" if self.options.backend is not None else ""
        lines = [f"backend: {self.backend}{forced}", *self.options.shown()]
        return "\n".join([super().__repr__()[:-1].rstrip("\n"), *lines, ")"])

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
        """One step of every row that has a gradient. Until `apply`, nothing is written but new states."""
        kept, scale, eager = self._kept, LossScale.of(self), NO_STEPS
        if not kept.stepping.acquire(False):
            raise RuntimeError("step() of one optimizer was called from two threads at once")
        try:
            asked = (kept.plan or kept.new_plan(self.param_groups, self.defaults, self)).asks_first
            if asked and scale.stops():  # what only one device steps reads found_inf there
                return
            # A torch function mode, as torch.set_default_device sets one, would make reading `.grad` 20 times slower.
            with torch._C.DisableTorchFunction():
                plan, rows, groups = kept.ready(self.param_groups, self.defaults, self.state, self)
                waits = plan.waits or bool(rows)
                if waits and not asked and scale.stops():
                    return
                step = plan.new_step(scale, kept.options.clip, waits=waits)
                if rows:
                    eager = EagerSteps(self, rows, groups, self.state, step.clip, step.grad_scale, plan.directions)
                by_global_norm = step.clip.kind == GLOBAL_NORM
                if plan.shards:
                    wants_total = waits and by_global_norm
                    step.exchange = Exchange(plan.shards, eager, plan.buffers, wants_total=wants_total)
                if (waits and (by_global_norm or step.finds_inf)) or (plan.shards and plan.reduces):
                    total = plan.native.reduce(step)
                    if waits and by_global_norm:
                        step.global_norm = global_norm([total, *eager.squares(plan.shards.values())])
                    if waits and step.finds_inf and (plan.has_found_inf() or eager.non_finite()):
                        scale.found()
                        return
                self._update(plan, step, eager, scale)
        finally:  # nothing of the parameters and gradients that the refresh has found is held any longer
            if kept.plan is not None:
                kept.plan.native.release()
            if eager is not NO_STEPS:
                eager.close()
            kept.stepping.release()

    def _update(self, plan: BuiltPlan, step: Step, eager: EagerSteps, scale: LossScale) -> None:
        """The part of a step that writes."""
        native = plan.native
        if eager is not NO_STEPS:
            eager.step(step.global_norm or 0.0, plan.shards.values())
        if plan.buffers and native.captured():
            self._kept.keep_for_replays(plan)
        if plan.directions is not None:
            step.exchange = plan.directions
        native.apply(step)
        if plan.directions is not None:
            plan.directions.finish()
        if eager is not NO_STEPS:
            eager.finish()
        written = native.written()
        grad_norm: float | Tensor | None = None
        if step.clip.kind == GLOBAL_NORM:
            grad_norm = plan.buffers[0].grad_norm if step.global_norm is None else step.global_norm
            if step.global_norm is None and not written and not plan.shards:
                grad_norm = 0.0  # nothing was launched that would write it
        measures = plan.measures or grad_norm is not None
        self._kept.last = LastStep(plan, eager.measured, grad_norm) if measures else None
        # Writing through addresses leaves the version counters alone; a stale graph must still raise.
        torch._C._increment_version(written)
        found = plan.buffers[0].found_inf if step.global_norm is None else None
        if found is not None and scale.found_inf is not None and found is not scale.found_inf:
            scale.found_inf.copy_(found, non_blocking=True)

    def refresh_masters(self) -> None:
        """Rebuild every master weight from its parameter: what it held below the parameter's precision is forgotten.

        No step needs this: an element that was written, through ``param.data`` too, counts as it is.
        """
        masters.rebuild(parameters(self.param_groups), self.state, self.options.master_weights)

    # Checkpoints ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and the groups in torch's form, with torch's keys.

        Where a factor of ``lr_scale`` or ``weight_decay_scale`` is not 1, one top-level key more,
        ``fused_optim_scales``, holds those factors. They are not loaded: it serves `load_state_dict` to warn in the log
        if the run goes on with others. ``torch.optim`` ignores it.

        Raises:
            KeyError: a parameter that has a state is in no group any more.
        """
        checkpoint.clear_absent(self.param_groups, self.state)
        state_dict = super().state_dict()
        checkpoint.remember_scales(self.param_groups, self.options, state_dict)
        return state_dict

    @torch._disable_dynamo
    def state_dict_for_torch(self) -> dict[str, Any]:
        """The state and the groups as the ``torch.optim`` namesake loads them, whatever ``state_dtype`` and
        ``master_weights`` are: 8-bit states as the float32 numbers that they stand for, and no master weights.

        Raises:
            KeyError: as `state_dict`.
        """
        return checkpoint.as_torch(self.param_groups, self, self.state_dict())

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or its ``torch.optim`` namesake; of apex's, DeepSpeed's or
        TransformerEngine's FusedAdam.

        Unlike torch's, it keeps the dtype of every state tensor and shares no memory with ``state_dict``, so that
        a resumed run equals the uninterrupted one bit for bit.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError, TypeError: something is missing, of another shape or no number; the text names it, and the
                optimizer is unchanged.
        """
        # torch calls pre-hooks in the order of registration: this one sees what the others made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, found: self._admit(found))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._kept.loading = None

    def _admit(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._kept.loading = checkpoint.admit(self.param_groups, self.defaults, self, self.options, state_dict)
        return self._kept.loading

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.get("_options")
        super().__setstate__({key: value for key, value in state.items() if key != "_options"})
        if "_kept" in self.__dict__:
            self._kept.options = self.options if options is None else options
        elif options is not None:
            self._kept = Kept(options, type(self).__name__)
            self._kept.built = True
        else:
            raise TypeError(
                f"this pickle of a whole {type(self).__name__} was written by an earlier version and cannot be read; "
                "build the optimizer and load its state_dict()"
            )
        self._kept.plan = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if self._kept.loading is not None:
            with lasting():
                checkpoint.restore(self.param_groups, self.state, self, self.options, self._kept.loading)
