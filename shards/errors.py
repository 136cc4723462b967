"""The one exception that every command turns into one clear line and a non-zero exit status."""


class UserError(Exception):
    """Something the user can mend. The message is one line that names the file, sample or flag, and the mend."""
