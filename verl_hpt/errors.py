"""The one error that a user can mend."""


class UserError(ValueError):
    """Something the user set, wrote or gave is wrong; the message says what, what was got, and what to set.

    The command line prints the message without a traceback and exits with status 2. A training run raises it before
    any model loads where that is possible.
    """


def raise_all(problems: list[str], head: str) -> None:
    """Raise one UserError that lists every problem; without one, do nothing."""
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else "\n  - ".join([head, *problems]))
