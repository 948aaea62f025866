"""Making a run happen.

:mod:`.command` says what is executed, :mod:`.directory` writes it down, :mod:`.process` starts, resumes and stops it,
and :mod:`.supervisor` is the small process that stays with it to its end.
"""
