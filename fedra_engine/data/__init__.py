"""Data sources, preprocessing, and the partition of samples among clients.

A source (`sources/`, one file each) yields `DomainData`: raw samples with their labels, domains and splits. `prepare`
decodes or tokenizes them once, into the cache on disk, and makes `Samples`, which executors take batches from.
`partition` divides the training samples among clients. Only `runtime` and `config` may be imported here.
"""
