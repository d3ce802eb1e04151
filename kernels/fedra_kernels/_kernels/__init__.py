"""What the public ops are made of: Triton kernels with the host code that launches them, their tiles, and checks.

No name in here is public: the ops next to this folder are. Imports from there the dispatch and the row groups alone.
"""
