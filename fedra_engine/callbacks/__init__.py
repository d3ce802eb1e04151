"""What watches a run, one file each: console, checkpoints, metrics, trace, partition report and adapter export.

With them is what they write to: the run's folder and its fingerprint. May import `callback` and all that an experiment
is made of; the round loop (`simulation`) imports none of them.
"""
