"""Runs that need the ordinary step: the one error for them."""


class NotStackable(Exception):
    """These runs cannot be trained as a stack, or compiled; the message says in one line why.

    They are then trained one by one. An error of somebody's code that was taken for this one is
    raised there again, and ends its own run.
    """
