"""What watches a run: console, trace, partition report, and the keeper of its folder with checkpoints and adapter.

With them is what they write to: the run's folder and its fingerprint. May import `callback` and all that an experiment
is made of; the round loop (`simulation`) imports none of them.
"""
