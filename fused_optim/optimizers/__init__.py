"""The optimizers, one page each: the class with its hyperparameters, and the formula beside it.

A formula is two functions, `prepare` (once a tensor) and `update` (each element), in torch operations: what the eager
path runs, and what the other backends are held to. csrc/rules and kernels/rules have the same text under the same stem.
`momentum.py` is the element update that SGD, LARS and NovoGrad share. LARC wraps another optimizer, and LARS is SGD's
rule; the factor that both have is fused_optim/rule/trust_ratio.py. The classes are imported by the package, not here.
"""
