"""Foundations: processes of a job, random draws, errors, exit codes, files and tables.

Imports no other room, and no torch outside `processes`.
"""
