"""The plan: which memory one optimizer's step reads and writes, with which numbers. One row a parameter.

`plan.py`: what every plan does, what a row is, and which parameters a native backend takes. The compiled plan is
csrc/plan; `python_plan.py` reads the same in Python, where there is no extension, with `read_rows.py`,
`read_groups.py`, `memory.py` and `unchanged.py`. `triton_plan.py` is around either of them: Triton kernels step
its Triton rows, the plan within steps the rest. `planner.py` decides which of them an optimizer gets. `readiness.py`
looks after rows that no plan can step as they are, `shards.py` adds norms up over processes.
"""
