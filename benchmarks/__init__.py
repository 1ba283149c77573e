"""Benchmarks of genft and of the peers it runs beside: time, memory, and the evidence that the figures are right."""
