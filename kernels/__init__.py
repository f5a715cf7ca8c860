"""Triton kernels; installed as `fused_optim.kernels`.

Importing this package imports triton. `phases.py` is where they are launched from; each rule is the twin of a struct in
``csrc/rules``, under the same stem.
"""
