"""The library from other frameworks, one file per framework."""
