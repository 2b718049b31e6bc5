"""The Hugging Face hub, where it can be reached."""

from __future__ import annotations

import functools
import logging
import os
import urllib.error
import urllib.request

import huggingface_hub

_TIMEOUT_SECONDS = 5


@functools.cache
def reachable() -> bool:
    """Whether the hub answers within seconds. Where it does not, its libraries are told to use their cache only.

    Without that they would try each file again for half a minute.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def rows(path: str, column: str, **kwargs):
    """Iterates over one text column of a hub data set, streamed where the hub can be reached, else from the cache.

    Raises OSError where the data set cannot be had.
    """
    online = reachable()
    import datasets  # slow to import, and only hub data needs it

    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        data = datasets.load_dataset(path, streaming=online, **kwargs)
        for row in data:
            yield row[column]
    except Exception as error:  # each storage backend raises its own kind
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise OSError(f"hub data set {path}: {reason}") from error
