"""The eager backend: steps in torch operations, for what no fused backend takes. Tests hold the others to it.

`parameter.py`: the step of one parameter, around the formula of fused_optim/optimizers. `steps.py`: all of one step's
eager rows, phase by phase beside the plan's, so that they take part in norms that several parameters share.
`sparse.py`: `lazy_mode`, where only the rows that a sparse gradient lists are stepped.
"""
