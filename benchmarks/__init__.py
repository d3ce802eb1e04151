"""Measurements that users can repeat: `launchers/microbench.py`."""
