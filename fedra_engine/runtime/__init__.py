"""What every room stands on: processes of a job, random draws, errors, exit codes, files and tables. Imports no other
room, and outside `processes` and `randomness` no torch."""
