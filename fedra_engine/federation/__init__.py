"""The federation: clients and their sampling, allocation, assignment, updates and aggregation.

Also records of rounds, averages over domains, and what a rising loss means. It may import runtime, config, data and
models; methods and executors are built on it.
"""
