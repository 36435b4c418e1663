"""The stand: inputs, tasks, clocks, floors, checks and result files, whatever is measured on it."""
