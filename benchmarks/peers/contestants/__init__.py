"""The contestants, a module each, with a function `serve` that takes a job and a loop of rounds."""
