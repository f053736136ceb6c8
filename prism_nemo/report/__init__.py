"""The page people look at: one self-contained HTML file from run directories and results.

`page.write_report` is the way in. `find.py` looks through the folders, `story.py` ties models, runs and results
together, `scores.py`, `costs.py`, `learned.py`, `periodic.py`, `changed.py` and `trusted.py` say what goes into each
part, `charts.py` draws, and the templates say how it looks. A quickstart has a summary beside its runs: `summary.py`
turns it into such results, and `quickstart_parts.py`, `samples.py` and `headline.py` show what nothing else records.

Left out on purpose: any number that the run did not record. A missing one is shown as "not measured" and listed at
the foot of the page.
"""
