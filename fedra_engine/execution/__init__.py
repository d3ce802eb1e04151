"""How a round is trained: the sweep executor and the sequential one that is its oracle, and what a sweep also measures.

Plans, lanes, banks, the sweep's model and blocks, memory, evaluation and the start of the head live here. May import
runtime, config, data, models, federation and methods.
"""
