"""The one class of errors that a user causes and can remedy: data, configs, files, or a machine without what is needed.

A message says what was found, what was needed, where, and the remedy. Commands print it in one line; every other
exception is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """Data, a config or a file is not as it must be; the message names the place and the remedy."""
