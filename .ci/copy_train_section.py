"""Copies the train section of one script into the other nine, so that it is changed once.

    python .ci/copy_train_section.py diffusion.py

What differs by design stays as it is in each file: the constants at the top of the section, and in
gan.py what makes the optimizers and takes a training step.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = "made pixelcnn gatedcnn rnn wavenet transformer vae vqvae gan diffusion".split()
RULER = "# ---------------------------------------------------------------- train\n"
CONSTANT = re.compile(r"^[A-Za-z_]+ = .*$", re.M)
# the optimizers and a training step: what stands between learning_rate and update_ema
GAN_PART = re.compile(
    r"(?<=\n\n\n)(class Muon|def make_optimizers).*(?=@torch.*\ndef update_ema)", re.S
)


def constants_text(section):
    """The lines from the first constant to the last one."""
    found = list(CONSTANT.finditer(section[: section.index("\n\n\n")]))
    return section[found[0].start() : found[-1].end()]


def adapt(section, old_section, is_gan):
    """The new section with those parts of the old one that differ by design."""
    section = section.replace(constants_text(section), constants_text(old_section))
    if is_gan:
        section = section.replace(GAN_PART.search(section)[0], GAN_PART.search(old_section)[0])
    return section


def main():
    if len(sys.argv) != 2 or Path(sys.argv[1]).stem not in SCRIPTS:
        sys.exit(__doc__)
    source = Path(sys.argv[1]).stem
    if source == "gan":
        sys.exit("gan.py has functions of its own: copy from another script")
    section = (ROOT / f"{source}.py").read_text().split(RULER)[1]
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        before, old_section = path.read_text().split(RULER)
        path.write_text(before + RULER + adapt(section, old_section, name == "gan"))


if __name__ == "__main__":
    main()
