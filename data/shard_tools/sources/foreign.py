"""What reading other people's files has in common: one error for what does not read, one for packages that are not there."""

from mpmae.errors import SourceError


class UnreadableError(ValueError):
    """Part of a source that cannot be read; the text says why, who catches it adds which tile and modality."""


def said(error: Exception) -> str:
    """An exception as messages quote it: some have no text but their type."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def missing_package(package: str, what: str, error: ImportError) -> SourceError:
    """The error to raise when an optional package cannot be imported."""
    return SourceError(f"{what} needs the package {package} ({error}); pip install mpmae[sources]")
