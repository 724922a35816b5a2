"""Trains the ten scripts, one after another, with their default settings.

    python bench/train_all.py                             # start it again to continue
    python bench/train_all.py --labels --scripts vae gan  # 3 epochs, into out/<script>-labels

bench/measure.py measures the runs.
"""

import argparse
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = "made pixelcnn gatedcnn rnn wavenet transformer vae vqvae gan diffusion".split()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument(
        "--labels", action="store_true", help="3 epochs with labels, into out/<script>-labels"
    )
    args = parser.parse_args(argv)
    for script in args.scripts:
        command = [sys.executable, str(ROOT / f"{script}.py")]
        out_dir = f"out/{script}"
        epochs = importlib.import_module(script).EPOCHS
        if args.labels:
            out_dir = f"out/{script}-labels"
            epochs = 3  # enough to see whether samples follow the labels
            command += ["--class-cond", "--epochs", str(epochs), "--out-dir", out_dir]
        checkpoint = Path(out_dir, "model.pt")
        if checkpoint.exists():
            command.append("--resume")
            epochs_done = len(torch.load(checkpoint, "cpu", weights_only=True)["log"])
            if epochs_done >= epochs:
                print(f"{out_dir}: all {epochs_done} epochs are done", flush=True)
                continue
        if subprocess.run(command).returncode != 0:
            sys.exit(f"{script}.py stopped; start again to continue")


if __name__ == "__main__":
    # by default, SIGTERM would end this script and leave the one that trains running
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to continue")
