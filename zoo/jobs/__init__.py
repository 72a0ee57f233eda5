"""Jobs that keep the zoo up to date: the list of them, what is stale and why, what became of their runs.

Nothing here runs anything: that is `pipelines.jobs`.
"""
