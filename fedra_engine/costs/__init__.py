"""The costs of training on clients: memory, FLOPs and bytes, and time on simulated devices.

May import the packages up to `execution`; does not know the round loop.
"""
