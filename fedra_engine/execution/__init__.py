"""The executors: the sweep, and the sequential one that is its oracle; also evaluation and head initialisation.

May import runtime, config, data, models, federation and methods.
"""
