"""The exception that every command turns into one line on stderr and a non-zero exit status."""


class UserError(Exception):
    """A problem that the user can fix.

    The message is one line. It names the file, sample or flag, and says what to do.
    """


def suggest_fix(error: OSError) -> str:
    """Return what the user can do about a write that the system refused."""
    if isinstance(error, PermissionError):
        return "Choose a folder that you may write to."
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "Choose a folder, or a name that does not exist yet."
    return "Fix that (if the disk is full, free some space), then run the same command again."
