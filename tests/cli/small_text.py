"""How little text most tests of the command line calibrate on."""

from __future__ import annotations

SMALL = ("--samples", 8, "--seq-len", 32, "--rank", 4)
