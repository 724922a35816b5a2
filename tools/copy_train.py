"""Copies the train section of one script into the other nine: python tools/copy_train.py vae.py"""

import sys
from pathlib import Path

RULER = "# ---------------------------------------------------------------- train\n"
SCRIPTS = "rnn made wavenet pixelcnn gatedcnn transformer vae vqvae gan diffusion".split()

section = Path(sys.argv[1]).read_text().split(RULER)[1]
for name in SCRIPTS:
    path = Path(__file__).parents[1] / f"{name}.py"
    above = path.read_text().split(RULER)[0]
    path.write_text(above + RULER + section)
