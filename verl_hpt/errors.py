"""The one error that a user can mend."""


class UserError(ValueError):
    """Something the user set, wrote or gave is wrong; the message says what, what was got, and what to set.

    The command line prints the message without a traceback and exits with status 2. A training run raises it before
    any model loads where that is possible.
    """
