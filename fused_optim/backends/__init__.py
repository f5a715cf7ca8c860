"""Who steps a parameter.

`choice.py`: which backend serves a device, and the log line where another one does. `extension.py`: the compiled
module, or the reason why there is none. Which parameters a backend takes stands in plan/plan.py.
"""
