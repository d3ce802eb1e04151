"""The frozen model: loading, sharding and structure; adapters, heads and the task (loss and scores).

May import runtime, config and data.
"""
