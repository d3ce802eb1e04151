"""The frozen model: how it is loaded and sharded, its parts, the adapters and heads beside it, and what it is for.

May import runtime, config and data.
"""
