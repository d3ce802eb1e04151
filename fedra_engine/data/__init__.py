"""Where samples come from, what a model is given of them, and which client has which.

A source (`sources/`, one file each) yields `DomainData`: samples that are not decoded yet, and what is known of each.
`prepare` decodes or tokenizes them once, into the cache on disk, and makes `Samples`, from which executors take their
batches. `partition` divides the training samples among clients. Only `runtime` and `config` may be imported here.
"""
