"""Triton kernels; installed as `fused_optim.kernels`.

Importing its modules imports triton. `phases.py` is where kernels are launched from: `refresh.py` brings a device's
table of rows (`table.py`) up to date, `layout.py` groups the rows into buckets, and what is launched are the generic
phases, `reduce.py`, `prepare.py` and `apply.py`. These put a rule's functions around each element or tensor. `rule.py`
is the contract of a rule, and rules/ has the rules, each the twin of a struct in csrc/rules under the same stem.
`storage.py`: number formats as bits. `transform.py`: what happens to a gradient before a rule sees it.
"""
