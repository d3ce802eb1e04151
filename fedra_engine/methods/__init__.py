"""The federated algorithms: assignment of participants, and aggregation of their updates.

A method's file has its docstring, its aggregator and its local terms; `base` has the interface and the table of names,
`fedra` the allocators by name; `registry` imports all methods. It may import runtime, config, models and federation,
and knows no executor.
"""
