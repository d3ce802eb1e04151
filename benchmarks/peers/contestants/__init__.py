"""The contestants, a module each, with a function `serve` that takes a job and a loop of rounds; and the yardstick.

Frameworks that own the main loop, such as Flower, must call the loop, so contestants get it and are not called by it.
"""
