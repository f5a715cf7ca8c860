"""Options that every optimizer has, and what its step reads of them.

`clip.py`: the three ways to clip gradients inside the step. `scales.py`: factors of the learning rate and the weight
decay, one of each a parameter, by name, by pattern or by a function, and parameters excluded from a trust ratio.
`layers.py`: factors that a model's layers give, for `lr_scale`. `peers.py`: arguments that only other libraries'
optimizers have, and what a constructor answers.
"""
