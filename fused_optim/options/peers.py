"""Arguments that optimizers of other libraries have: how each is written here, or why there is none.

One table for the constructors, which refuse such an argument with its answer, and for docs/swap.md, which lists them by
library.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple, ParamSpec

P = ParamSpec("P")


class PeerArgument(NamedTuple):
    """An argument of other libraries' optimizers.

    ``value_type``: where an optimizer here has an argument of that name, which values are the other libraries' alone.
    """

    name: str
    peers: tuple[str, ...]
    answer: str
    value_type: type | None = None


APEX, DEEPSPEED, TRANSFORMER_ENGINE = "apex", "DeepSpeed", "TransformerEngine"
BITSANDBYTES, TIMM, PADDLE = "bitsandbytes", "timm", "Paddle"
PEERS = (APEX, DEEPSPEED, TRANSFORMER_ENGINE, BITSANDBYTES, TIMM, PADDLE)

PEER_ARGUMENTS = (
    PeerArgument(
        "bias_correction",
        (APEX, DEEPSPEED, TRANSFORMER_ENGINE, BITSANDBYTES),
        "there is no choice: Adam and AdamW correct their averages, as with True; LAMB and NovoGrad have the argument",
    ),
    PeerArgument(
        "adam_w_mode",
        (APEX, DEEPSPEED, TRANSFORMER_ENGINE, BITSANDBYTES),
        "take AdamW for True, Adam for False; the decay of LAMB is in its direction, as with True",
    ),
    PeerArgument("adamw_mode", (DEEPSPEED,), "take AdamW for True, Adam for False"),
    PeerArgument(
        "set_grad_none",
        (APEX, DEEPSPEED, TRANSFORMER_ENGINE),
        "say it to zero_grad(set_to_none=...), as in torch, whose default is True",
    ),
    PeerArgument(
        "master_weights",
        (APEX, TRANSFORMER_ENGINE),
        "write 'float32' for True (a whole float32 master), or 'split' (the 16 bits that a bfloat16 parameter lacks of "
        "it), and None for False",
        value_type=bool,
    ),
    PeerArgument("store_param_remainders", (APEX, TRANSFORMER_ENGINE), "write master_weights='split'"),
    PeerArgument("master_weight_dtype", (TRANSFORMER_ENGINE,), "there is no choice: master_weights are float32"),
    PeerArgument("exp_avg_dtype", (TRANSFORMER_ENGINE,), "write state_dtype={'exp_avg': ...}"),
    PeerArgument("exp_avg_sq_dtype", (TRANSFORMER_ENGINE,), "write state_dtype={'exp_avg_sq': ...}"),
    PeerArgument("fp32_optimizer_states", (DEEPSPEED,), "write state_dtype=torch.float32 for True"),
    PeerArgument(
        "use_decoupled_grad",
        (TRANSFORMER_ENGINE,),
        "there is none: param.grad is read, which may be float32 beside a 16-bit parameter",
    ),
    PeerArgument("reduced_precision_dtype", (APEX,), "write master_weights='float32', and make the parameters 16-bit"),
    PeerArgument(
        "max_grad_norm", (APEX, DEEPSPEED), "write grad_clip=ClipGradByGlobalNorm(max_grad_norm); LAMB has the argument"
    ),
    PeerArgument("use_nvlamb", (APEX,), "write always_adapt= of LAMB"),
    PeerArgument("max_coeff", (DEEPSPEED,), "write trust_clip=True of LAMB, whose bound is 1; there is no other"),
    PeerArgument("min_coeff", (DEEPSPEED,), "there is none: the ratio of LAMB has no lower bound"),
    PeerArgument("eps_inside_sqrt", (APEX, DEEPSPEED), "there is no choice: eps is added to the root, as with False"),
    PeerArgument(
        "wd_after_momentum",
        (APEX, TRANSFORMER_ENGINE),
        "there is no choice: weight decay is added to the gradient, before momentum, as with False",
    ),
    PeerArgument(
        "materialize_master_grads",
        (APEX, TRANSFORMER_ENGINE),
        "there is none: gradients are read as they are, and no copies of them are kept",
    ),
    PeerArgument("step", (APEX,), "there is none: each parameter counts its own steps, which a checkpoint brings back"),
    PeerArgument("trust_coefficient", (APEX,), "write eta= of LARC"),
    PeerArgument("clip", (APEX,), "write mode='clip' of LARC for True, mode='scale' for False"),
    PeerArgument("model_params", (DEEPSPEED,), "write params="),
    PeerArgument(
        "optim_bits",
        (BITSANDBYTES,),
        "write state_dtype='8bit' for 8, None for 32; torch.bfloat16 makes states of 16 bits",
    ),
    PeerArgument("min_8bit_size", (BITSANDBYTES,), "there is no choice: states of 8 bits have 4,096 elements or more"),
    PeerArgument("block_wise", (BITSANDBYTES,), "there is no choice: states of 8 bits have a scale for 32 elements"),
    PeerArgument("is_paged", (BITSANDBYTES,), "there is none: a state stays on the device of its parameter"),
    PeerArgument(
        "percentile_clipping",
        (BITSANDBYTES,),
        "there is none by percentile; grad_clip= takes a threshold, and ClipGradByGlobalNorm(math.inf) measures one",
    ),
    PeerArgument(
        "max_unorm",
        (BITSANDBYTES,),
        "write trust_clip=True of LAMB or LARS, or put LARC around another optimizer",
    ),
    PeerArgument(
        "skip_zeros",
        (BITSANDBYTES,),
        "there is none: a zero is a gradient like any other; lazy_mode= skips rows that a sparse one does not list",
    ),
    PeerArgument("args", (BITSANDBYTES,), "write the options one by one"),
    PeerArgument("trust_coeff", (TIMM,), "write trust_coefficient= of LARS"),
    PeerArgument("caution", (TIMM,), "there is none: no update is masked by the sign of its gradient"),
    PeerArgument("corrected_weight_decay", (TIMM,), "there is none: schedule param_groups[i]['weight_decay'] instead"),
    PeerArgument("decoupled_decay", (TIMM,), "there is none but NovoGrad's; the decay of AdamW and Lion is decoupled"),
    PeerArgument("learning_rate", (PADDLE,), "write lr="),
    PeerArgument("beta1", (PADDLE,), "write betas=(beta1, beta2)"),
    PeerArgument("beta2", (PADDLE,), "write betas=(beta1, beta2)"),
    PeerArgument("epsilon", (PADDLE,), "write eps="),
    PeerArgument("parameters", (PADDLE,), "write params=model.named_parameters()"),
    PeerArgument("lr_ratio", (PADDLE,), "write lr_scale="),
    PeerArgument("apply_decay_param_fun", (PADDLE,), "write weight_decay_scale=, or take AdamWDL, which has it"),
    PeerArgument("multi_precision", (PADDLE,), "write master_weights='float32' for True"),
    PeerArgument("name", (PADDLE,), "there is none: states have torch's names, without a prefix"),
)
_BY_NAME = {argument.name: argument for argument in PEER_ARGUMENTS}


def refuse_peer_arguments(init: Callable[P, None]) -> Callable[P, None]:
    """A constructor that answers what other libraries' optimizers would take; it keeps its signature.

    Raises:
        TypeError: such an argument; the text says how it is written here, or why there is none.
    """
    own = inspect.signature(init).parameters

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name, value in kwargs.items():
            peer = _BY_NAME.get(name)
            if peer is None:
                continue
            kind = type(args[0]).__name__
            if name not in own:
                raise TypeError(f"{kind} has no argument {name!r} ({', '.join(peer.peers)}): {peer.answer}")
            if peer.value_type is not None and isinstance(value, peer.value_type):
                raise TypeError(f"{kind}'s {name} cannot be {value!r} ({', '.join(peer.peers)}): {peer.answer}")
        init(*args, **kwargs)

    return checked
