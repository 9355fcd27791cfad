"""Demonstrations: small models and tasks made on this machine, then the public commands run on them.

Nothing outside this package knows a demonstration's name; a demonstration uses nothing that a user could not.
"""
