"""Benchmarks: each prints a table and says how to run it again."""
