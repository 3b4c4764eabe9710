"""The error about runs that need the ordinary step."""


class NotStackable(Exception):
    """These runs cannot be trained as a stack or compiled; the message says why, in one line.

    They are then trained one by one. If the true cause was an error in the user's code, that
    training raises the error again, and only its own run ends.
    """
