"""Errors that are the user's to mend."""


class UserError(Exception):
    """The input is wrong: one message says what, where, what is allowed and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
