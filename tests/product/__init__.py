"""What stands around the library: the bench, the examples, the packages, the documentation."""
