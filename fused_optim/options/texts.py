"""The text of each option that several optimizers have, once: `explains_options` puts it into their docstrings."""

from __future__ import annotations

import inspect
import re
from typing import TypeVar

# As they stand in a docstring's ``Args``; a text may explain two options together.
TEXTS: dict[tuple[str, ...], str] = {
    ("params",): """
        params: parameters, a list of group dicts, or ``named_parameters()``.
    """,
    ("maximize",): """
        maximize: ascend instead of descend.
    """,
    ("foreach", "fused"): """
        foreach, fused: accepted for scripts and checkpoints that carry them; they choose no backend, ``backend`` does.
            With ``fused=True`` torch's GradScaler leaves the loss scale to the step.
    """,
    ("capturable",): """
        capturable: for capture into a CUDA graph; without effect on CPU tensors.
    """,
    ("differentiable",): """
        differentiable: record the step with autograd; it then runs on the eager path.
    """,
    ("backend",): """
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"eager"``; default None: what the environment variable
            ``FUSED_OPTIM_BACKEND`` names, otherwise the best there is for each device.
    """,
    ("lr_scale", "weight_decay_scale"): """
        lr_scale, weight_decay_scale: factors of ``lr`` and of ``weight_decay`` per parameter, at no launch and no
            param group: a callable ``(name, param) -> float`` (names take ``named_parameters()``), a mapping by
            parameter or by name pattern (first match wins, unmatched 1.0), or a sequence in the order of the
            parameters. Default None: 1.0.
    """,
    ("grad_clip",): """
        grad_clip: :class:`ClipGradByGlobalNorm`, :class:`ClipGradByNorm` or :class:`ClipGradByValue`, applied inside
            the update; ``param.grad`` is not written. Default None: no clipping.
    """,
    ("master_weights",): """
        master_weights: ``"float32"``: a float32 master of each 16-bit parameter in the state (``master_param``);
            ``"split"``: the 16 bits that a bfloat16 parameter lacks of it (``param_remainder``, int16), the same run
            bit for bit; ``"split8"``: the upper 8 of those bits (``param_remainder``, int8), a master of 24 bits that
            is rounded by random words. Default None: none.
    """,
    ("state_dtype",): """
        state_dtype: how the states of a number an element are kept: ``torch.float32``, ``torch.bfloat16`` or
            ``torch.float16``; ``"8bit"``: as codes of a byte (``exp_avg``, int8; ``exp_avg_sq``, uint8) with a scale
            for 32 of them (``exp_avg_scale``, ``exp_avg_sq_scale``), where the parameter has 4,096 elements or more
            and rows of a multiple of 32, elsewhere float32; or a mapping to those by the names of states. Default
            None: the parameter's dtype, as in torch, or float32 where there are master weights.
    """,
    ("rounding", "seed"): """
        rounding: how parameters and states that are stored in 16 bits are rounded: ``"nearest"``, or ``"stochastic"``:
            up or down, so that the mean over the steps is right; beside master weights the parameters are not. Default
            ``"nearest"``.
        seed: of the random words of stochastic rounding, of ``"8bit"`` and of ``"split8"``, from 0 to 2^32 - 1; a word
            depends on it, on the parameter's place in the optimizer, its step and the element's place in it, and on
            nothing else. Default 0.
    """,
}

Documented = TypeVar("Documented", bound=type)


def explained(docstring: str) -> set[str]:
    """The parameters that the ``Args`` of a docstring explain."""
    section = re.search(r"^ {4}Args:\n(.*?)(?=^ {4}\S|\Z)", docstring, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^ {8}(\w[\w, ]*):", section[1] if section else "", re.MULTILINE)
    return {name for line in lines for name in line.split(", ")}


def explains_options(documented: Documented) -> Documented:
    """A class decorator: what the docstring's ``Args`` leave out is explained there by the texts of this page."""
    if documented.__doc__ is None:  # python -OO
        return documented
    known = explained(documented.__doc__)
    left = [name for name in inspect.signature(documented).parameters if name not in known]
    texts = [text.strip("\n").rstrip() for names, text in TEXTS.items() if any(name in left for name in names)]
    first = [text for text in texts if text.lstrip().startswith("params:")]
    others = [text for text in texts if text not in first]
    doc = documented.__doc__
    doc = doc.replace("    Args:\n", "\n".join(["    Args:", *first, ""]), 1)
    section = re.search(r"^ {4}Args:\n.*?(?=\n\n|\n {4}\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    if section is not None:
        doc = "\n".join([doc[: section.end()], *others]) + doc[section.end() :]
    documented.__doc__ = doc
    return documented
