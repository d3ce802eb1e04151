"""Studies: many experiments under one command, reported side by side.

`compare` runs methods with several seeds, `scale` measures rounds of more and more clients. Both reuse what earlier
commands finished, lock what they work on, and write tables and figures. May import everything but the public API and
the commands, which read the options.
"""
