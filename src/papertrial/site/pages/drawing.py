"""Draws all figures of a paper's evidence into a folder: ``python -m papertrial.site.pages.drawing SLUG SCALE FOLDER``.

A process of its own, so that matplotlib is neither imported by the service nor holds up its threads.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from papertrial.errors import PapertrialError, UsageError
from papertrial.lab.claim import find_card
from papertrial.lab.evidence import reference_evidence
from papertrial.lab.figures import NARROW, WIDE
from papertrial.lab.report import drawings

#: An image does not inherit the page's colours: it brings both themes along.
STYLE = "<style>svg{color:#1c2230}@media (prefers-color-scheme:dark){svg{color:#e8e6e1}}</style>"


def draw(slug: str, scale: str, folder: Path) -> None:
    """Draw ``arms-N.svg``, ``curves-N.svg`` and ``figures-N.svg``, and each for phones as ``...-narrow.svg``.

    The folder appears when all are done.

    Raises
    ------
    UsageError
        There is no such paper, or no evidence at that scale.
    """
    card = find_card(slug)
    evidence = reference_evidence(card).get(scale)
    if evidence is None:
        raise UsageError(f"{slug} has no evidence at {scale}")
    metrics = list(dict.fromkeys(claim.metric for claim in card.claim))
    pictures: dict[str, str] = {}
    for width, end in ((WIDE, ""), (NARROW, "-narrow")):
        drawn = drawings(card, evidence, width)
        pictures |= {f"arms-{metrics.index(metric)}{end}": svg for metric, svg in drawn["arms"].items()}
        pictures |= {f"curves-{place}{end}": svg for place, svg in enumerate(drawn["curves"].values())}
        pictures |= {f"figures-{place}{end}": figure["svg"] for place, figure in enumerate(drawn["figures"])}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".drawing-"))
    try:
        for name, svg in pictures.items():
            start = svg.index(">") + 1
            (temporary / f"{name}.svg").write_text(svg[:start] + STYLE + svg[start:], encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker, with the same figures
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in folder.parent.glob(f"{slug}-{scale}-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    try:
        draw(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except PapertrialError as error:
        sys.exit(str(error))
