"""The page people look at: one self-contained HTML file from the directory of a quickstart run.

`page.write_report` is the way in. `read.py` reads, `charts.py` draws, `outcome.py`, `learning.py`, `insides.py`,
`samples.py` and `ledger.py` say what goes into each part, and the templates say how it looks.

Left out on purpose: any number that the run did not record. A missing one is shown as "not measured" and listed at
the foot of the page.
"""
