"""Whether a configuration would train, fit and keep the device busy: found out before a run, on the user's own data.

A check makes findings (:mod:`eyetune.findings`): pass or fail, what was measured, and what to do.
"""
