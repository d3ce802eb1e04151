"""The engine's own callbacks, the run folder that they write to, and what goes on with an earlier run.

May import `callback` and all that an experiment is made of; the round loop (`simulation`) imports none of them.
"""
