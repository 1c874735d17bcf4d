"""The parts of ``benchmark.py``: rows, floors, child processes, and the table."""
