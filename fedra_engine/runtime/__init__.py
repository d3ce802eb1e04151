"""Foundations: processes of a job, random draws, errors, exit codes, files, tables and selections.

Imports no other package of the engine, and no torch outside `processes`.
"""
