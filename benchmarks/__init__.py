"""Benchmarks of every stage, of whole aggregations, of growth, and the acceptance measurement.

    python -m pytest benchmarks --benchmark-only --results benchmarks/results
    python -m benchmarks.scaling
    python -m benchmarks.acceptance
    python -m benchmarks.figures

The first three write ``benchmarks/results/<device>/*.json``; the last makes the README's table and
the figures from them.
"""
