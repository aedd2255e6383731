"""Gradient descent on the deep unconstrained features model.

`sweep.run` descends on all runs of a `grid.Grid`: `phases` says what each run is due for,
`programs` has the compiled chunks of steps, `step.descend` on all samples and `groups.descend` on
groups of samples that have come together, and `records` what comes out.
"""
