"""The object: what users may do with an optimizer, in which order, and what is refused."""
