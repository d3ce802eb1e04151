"""What a federation consists of: clients and who takes part, their assignments and updates, and the means of these.

It may import runtime, config, data and models; methods and executors are built on it.
"""
