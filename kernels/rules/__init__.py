"""The rules as Triton compiles them: each the twin of csrc/rules and of fused_optim/optimizers, under the same stem.

A module lists its rules in `RULES`; `rules()` in phases.py finds them by looking through this folder. `../rule.py` is
the contract. `momentum.py` is the element update that SGD, LARS and NovoGrad share, and `trust_ratio.py` LARC's and
LARS's factor of a gradient, which any rule is composed with: neither is a rule.
"""
