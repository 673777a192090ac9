"""The one kind of exception that MUROAN raises on purpose."""


class MuroanError(Exception):
    """Bad input: the message says what was expected, what came, and what to do.

    The command line prints the message alone; in Python it is an ordinary exception.
    """
