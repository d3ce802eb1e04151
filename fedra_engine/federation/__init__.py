"""The federation: clients and their sampling, allocation, assignment, updates and aggregation.

It may import runtime, config, data and models; methods and executors are built on it.
"""
