"""The report of a run: one HTML page without any network, made from the files in the run's folder.

May import `callback`, the callbacks and what they are made of. All but `writer` needs neither torch nor a model.
"""
