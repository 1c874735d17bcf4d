"""recclr: train, judge and ship two-tower retrieval models from interaction logs."""

__version__ = "0.1.0"
