"""The parts of ``benchmark.py``: what is measured, how, beside which floors, and the tables."""
