"""Open images without Pillow's own limits."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

from PIL import Image

_opening = threading.Lock()


@contextlib.contextmanager
def pillow_limits_off() -> Iterator[None]:
    """Switch off Pillow's limit of pixels, for which ``max_pixels`` stands in this project, and its warnings.

    Both are settings of the process. They are restored afterwards, and one thread at a time changes them.
    """
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata: an image decodes, or has a reason why not
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
