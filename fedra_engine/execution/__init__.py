"""The executors: the sweep, and the sequential one that is its oracle.

Also evaluation and its metrics, head initialisation, the fit of stand-ins, and the sizes of images that a model takes.
May import runtime, config, data, models, federation and methods.
"""
