"""What training takes of clients, by counting: memory, FLOPs and bytes, and the time on simulated devices.

May import the rooms up to `execution`; knows nothing of the round loop.
"""
