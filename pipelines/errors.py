"""Errors that end with one line for the user instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: it names the field or file, and the mend."""


class DataError(UserError):
    """Data that cannot be used as it is: the message names the file, the sample and what to do."""


class CorruptImage(DataError):
    """The bytes of one image are there, and cannot be decoded."""
