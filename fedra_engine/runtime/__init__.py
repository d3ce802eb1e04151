"""Foundations: processes of a job, random draws, errors, exit codes, files, tables, texts of measures.

Imports no other package of the engine, and no torch outside `processes`.
"""
