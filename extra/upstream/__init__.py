"""Tools that make the upstream patch: one diff against the source of a Celery release.

``python -m upstream patch RELEASE`` writes it; ``python -m upstream test RELEASE`` compares Celery's own unit tests
without and with it. Both are called by the Makefile.
"""
