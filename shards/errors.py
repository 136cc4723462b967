"""The one exception that every command turns into one clear line and a non-zero exit status."""


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file, sample or flag, and the mend."""


def mend_of(error: OSError) -> str:
    """What the user can do about a refused write."""
    if isinstance(error, PermissionError):
        return "choose a folder that you may write to"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "choose a folder, or a name that does not exist yet"
    return "mend that (a full disk: free some space), then run the same command again"
