"""The stages of an experiment: typed config in, declared inputs and outputs, ``run``."""
