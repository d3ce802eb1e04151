"""Foundations: processes of a job, random draws, errors, exit codes, files and tables.

Imports no other package of the engine, and no torch outside `processes`.
"""
