"""The study's grid at pocket size, with the controls that it lacks: cells, measures, verdicts and the page."""
