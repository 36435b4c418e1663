"""Kinds: how the layers that PEFT trains keep pairs of factors in its file, one file per kind."""
