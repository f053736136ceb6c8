"""The whole pipeline at pocket size on this machine, ending in a report."""
