"""Studies: many experiments under one command, and what a reader wants to see of them side by side.

`compare` runs methods with seeds, `scale` measures rounds of more and more clients. Both plan (`plan.py`), find what
earlier commands did, lock what they are at work on, and leave tables and figures (`report.py`). May import every room
but the public API and the commands, which read the options.
"""
