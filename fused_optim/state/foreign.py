"""8-bit states of other libraries' optimizers in a checkpoint, as the numbers that they stand for.

torchao's are tensors that hold codes, scales and a table of numbers; bitsandbytes' are tensors ``state1`` and
``state2`` with tables and scales beside them. Both tables are that of Dettmers, "8-Bit Approximations for Parallelism
in Deep Learning", and come with the states. None of the libraries is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Where bitsandbytes keeps states that FSDP must not touch.
WRAPPED = "__bnb_optimizer_quant_state__"
BLOCKS = (256, 2048)  # bitsandbytes' elements of a scale: of its present versions, and of earlier ones


def _block_of(codes: Tensor, scales: Any, key: str) -> int:
    """How many elements have a scale of bitsandbytes.

    Raises:
        ValueError: the text says which scales are missing or do not fit.
    """
    if not isinstance(scales, Tensor):
        raise ValueError(
            f"there is no {key!r} beside bitsandbytes' codes: states of block_wise=False are not read; save them "
            "from an optimizer with block_wise=True"
        )
    block = next((block for block in BLOCKS if -(-codes.numel() // block) == scales.numel()), None)
    if block is None:
        found, sizes = f"{scales.numel()} scales for {codes.numel()} codes", " or ".join(map(str, BLOCKS))
        raise ValueError(f"{key!r} holds {found} of bitsandbytes, which has one for {sizes}")
    return block


def _decoded(codes: Tensor, table: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each code's number of the table, times the scale of its block; the last block may be short."""
    of_element = scales.reshape(-1).repeat_interleave(block)[: codes.numel()]
    return (table[codes.reshape(-1).long()] * of_element).view(codes.shape)


def as_numbers(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A state with what is foreign in it decoded.

    Args:
        state: of one parameter.
        names: of the rule's states of a number an element, in their order.

    Raises:
        ValueError: states that cannot be decoded; the text says whose they are, and the way out.
    """
    found = {key: value for key, value in state.items() if key != WRAPPED}
    if isinstance(state.get(WRAPPED), Mapping):
        found |= state[WRAPPED]
    foreign = next((key for key in found if isinstance(key, str) and key.endswith("::quantized")), None)
    if foreign is not None:
        raise ValueError(
            f"{foreign!r} is flashoptim's code of 8 bits, which is not read; save its state_dict from an optimizer "
            "with compress_state_dict=False"
        )
    for key, value in found.items():
        if type(value).__name__ in ("OptimState4bit", "OptimStateFp8"):
            raise ValueError(
                f"{key!r} is torchao's {type(value).__name__}, which is not read; save value.dequantize() in its place"
            )
        if type(value).__name__ == "OptimState8bit":
            found[key] = _decoded(value.codes, value.qmap, value.scale, value.codes.numel() // value.scale.numel())
    if "state1" not in found:
        return found
    ours = {}
    for number, name in enumerate(names[:2], 1):
        value = found.get(f"state{number}")
        if isinstance(value, Tensor) and f"qmap{number}" in found:
            scales: Any = found.get(f"absmax{number}")
            block = _block_of(value, scales, f"absmax{number}")
            value = _decoded(value, found[f"qmap{number}"], scales, block)
        if value is not None:
            ours[name] = value
    theirs = {f"{kind}{number}" for kind in ("state", "qmap", "absmax") for number in (1, 2)}
    return {key: value for key, value in found.items() if key not in theirs} | ours
