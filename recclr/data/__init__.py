"""From tables to tensors. The only place that knows data frames; everything above sees tensors.

``log`` needs torch alone; the other modules need polars and are imported where they are used.
"""
