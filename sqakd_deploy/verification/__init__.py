"""Whether a file is its student, and if not, where and why.

All modules here but :mod:`~sqakd_deploy.verification.student` are free of torch, so that a file can
be verified against saved answers where it is deployed.
"""
