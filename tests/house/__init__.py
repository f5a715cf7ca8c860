"""The rules of the house: what may name what, what a new optimizer touches, which names are public."""
