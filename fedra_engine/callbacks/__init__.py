"""The engine's own callbacks: console, trace, partition report, and checkpoints; with the run folder they write to.

May import `callback` and all that an experiment is made of; the round loop (`simulation`) imports none of them.
"""
