"""Figures as files: drawn once for each evidence, kept on the disk, and good for ever under their address."""

import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi import Path as InPath
from starlette.responses import FileResponse, Response

from papertrial.site.board import Entry
from papertrial.site.context import Here
from papertrial.site.errors import Problem, not_found
from papertrial.site.pages.trial_view import figure_digest, figure_folder

log = logging.getLogger("papertrial.site")
router = APIRouter(include_in_schema=False)

DRAWING_SECONDS = 120
WAIT_SECONDS = 30
_drawing = threading.Lock()
_NAME = re.compile(r"(?:arms|curves|figures)-\d{1,3}(?:-narrow)?")

#: matplotlib writes style attributes; as a document of its own a figure may have them, and nothing else.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

Slug = Annotated[str, InPath(max_length=80)]


@router.get("/figures/{slug}/{scale}/{digest}/{name}.svg")
def figure(slug: Slug, scale: str, digest: str, name: str, here: Here) -> Response:
    """One figure of the evidence that the digest names."""
    entry = here.board.snapshot.get(slug)
    evidence = entry.standing.evidence.get(scale) if entry else None
    if entry is None or evidence is None or not _NAME.fullmatch(name) or digest != figure_digest(entry, scale):
        raise not_found("this figure")
    folder = figure_folder(here.settings.folder, entry, scale, digest)
    if not folder.is_dir():
        _draw(entry, scale, folder)
    path = folder / f"{name}.svg"
    if not path.is_file():
        raise not_found("this figure")
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "Content-Security-Policy": _POLICY}
    return FileResponse(path, media_type="image/svg+xml", headers=headers)


def _draw(entry: Entry, scale: str, folder: Path) -> None:
    """Draw all figures of an evidence in a process of its own, one evidence at a time."""
    busy = Problem(503, "the figures are being drawn; try again in a minute", headers={"Retry-After": "30"})
    if not _drawing.acquire(timeout=WAIT_SECONDS):
        raise busy
    try:
        if folder.is_dir():
            return
        command = [sys.executable, "-m", "papertrial.site.pages.drawing", entry.card.slug, scale, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "svg"}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=DRAWING_SECONDS, check=False)
        if done.returncode:
            log.error("figures of %s: %s", entry.card.slug, done.stderr.decode("utf-8", "replace")[-2000:])
            raise Problem(503, "the figures could not be drawn; the service's log says why")
    except subprocess.TimeoutExpired:
        raise busy from None
    finally:
        _drawing.release()
