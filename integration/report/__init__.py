"""What a run leaves for its readers: summary.json, the table, report.html, pages of the docs.

summary.py         summary.json: what every rule comes to
intervals.py       confidence intervals over seeds
table.py           the table at the end of a comparison
html.py            report.html of one or several runs
series.py          the rounds that a report draws
figures.py         its figures; module_figures.py draws the single modules
panels.py          a panel for each rule
palette.py         colors and style of all figures, also those of benchmarks/
page_filler.py     text between the marks of a page, also for benchmarks/
pages.py           the README's quickstart section and the tables of docs/rules.md and findings.md
tracking.py        the same rounds for TensorBoard and Weights & Biases
live.py            where the rounds of a running comparison go
"""
