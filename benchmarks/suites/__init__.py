"""Suites: one file each, with one object ``SUITE`` (see ``benchmarks/stand/suite.py``)."""
