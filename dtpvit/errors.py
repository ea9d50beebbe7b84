"""The one exception whose message is meant for the person at the keyboard."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Something the user can put right: a wrong path, a data set of another shape, a foreign checkpoint.

    The message is one sentence that names what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with code 2.
    """
