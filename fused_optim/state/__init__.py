"""What an optimizer keeps of each parameter from step to step.

`states.py`: states created, checked before a step, and brought into the shape that the plan reads. `formats.py`:
how they lie in memory, as a dtype or as codes of a byte, and `codec.py` those codes. `masters.py`: float32 master
weights of 16-bit parameters, whole or split. `checkpoint.py`: what is admitted as a checkpoint, and how its tensors
come back in the dtype in which they were saved.
"""
