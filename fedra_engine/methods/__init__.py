"""The federated algorithms: what participants train and what the server makes of it.

A method's file has its docstring, its aggregator and its local terms; `base` has the seam and the table of names,
`fedra` the allocators by name, `registry` brings all methods in. It may import runtime, config, models and
federation, and knows no executor.
"""
