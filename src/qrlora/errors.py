"""The one exception users see, and the one warning category."""


class QrloraError(Exception):
    """Bad input, told in one sentence that names the culprit and the way out.

    The command line prints the message and exits with code 2; a library caller can catch this one class for everything
    that the user can mend. Programming errors stay ordinary exceptions.
    """


class QrloraWarning(UserWarning):
    """Something was mended or chosen for the user that they may want to know about."""
