"""Batch filtering of caption datasets: readers, the filter, the result folder, and Ray actors."""
