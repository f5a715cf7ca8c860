"""What the mathematics of an optimizer is written in.

`contract.py`: what an optimizer's class says of it; the mechanism asks for nothing else. `hyperparameters.py`: which
numbers a param group may have. `arithmetic.py`: numbers of one tensor, as Python floats or as tensors on a device.
`trust_ratio.py`: LARC's and LARS's factor of a gradient. `orthogonal.py`: Muon's matrices, many at once.
"""
