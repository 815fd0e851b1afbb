"""One folder per paper, in one folder per family; adding a paper is adding a folder.

A team's own papers may live outside the package: ``PAPERTRIAL_PAPERS`` names a further folder of the same shape.
"""

import os

if os.environ.get("PAPERTRIAL_PAPERS"):
    __path__.append(os.path.abspath(os.environ["PAPERTRIAL_PAPERS"]))
