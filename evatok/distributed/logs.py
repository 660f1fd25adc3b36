"""A log file per training worker, in the folder of its stage."""

from __future__ import annotations

import io
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evatok.artifacts import Location

log = logging.getLogger(__name__)


@contextmanager
def rank_log(location: Location, rank: int) -> Iterator[Callable[[], None]]:
    """What this process logs within the block, in ``logs/rank-NNNN.log`` below ``location``.

    An attempt that goes on adds to the file of the one before. Gives what publishes the file; it is published
    at the block's end in any case, with the traceback of what ended it.
    """
    name = f"logs/rank-{rank:04d}.log"
    text = io.StringIO()
    text.write(location.read_bytes(name).decode() if location.exists(name) else "")
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("evatok")
    level = ours.level
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)

    def publish() -> None:
        location.write_bytes(name, text.getvalue().encode())

    try:
        log.info("rank %d begins on %s", rank, socket.gethostname())
        yield publish
        log.info("rank %d is done", rank)
    except BaseException:
        log.exception("rank %d ends by an error", rank)
        raise
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        publish()
