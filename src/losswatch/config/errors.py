"""The error about a config that cannot work."""


class ConfigError(ValueError):
    """A value of the config that cannot work; the message is one line for the user."""
