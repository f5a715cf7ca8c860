"""What the library says of itself.

`config.py`: `show_config()` and the version. `description.py`: `describe()`, what an optimizer does to each parameter.
"""
