"""Errors that a person can act on.

Each message says what was wanted, what came, what to do, and where. The command line prints the
message on one line and exits with :attr:`SqakdError.exit_code`; the API raises it.
"""


class SqakdError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class SpecError(SqakdError):
    """A setting is unknown, out of range or contradicts another."""

    exit_code = 2


class UnavailableError(SpecError):
    """A plugin cannot work because a package that it needs is not installed.

    A plugin raises it when it is made: it is then left out without a warning, and whoever asks for
    it by name gets this message.
    """


class ParityError(SqakdError):
    """An exported file does not give the answers of its student."""

    exit_code = 3


class DataError(SqakdError):
    """Images are missing, unreadable or of the wrong shape."""

    exit_code = 4


class CheckpointError(SqakdError):
    """A run folder or a weight file is missing, truncated or belongs to another model."""

    exit_code = 5


class ModelError(SqakdError):
    """A model cannot be found, built, traced or quantised."""

    exit_code = 6


class ExportError(SqakdError):
    """A student cannot be written for the chosen target."""

    exit_code = 7


class TrainingError(SqakdError):
    """Training cannot go on, for instance because the loss is not finite."""

    exit_code = 8
