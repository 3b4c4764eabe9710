"""The one error for runs that need the ordinary step."""


class NotStackable(Exception):
    """These runs cannot be trained as a stack, or compiled; the message says in one line why.

    It is raised where that is detected. Any other error, of somebody's code, of the memory or a bug
    of ours, is an error of the runs.
    """
