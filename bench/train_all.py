"""Train all ten scripts, one after another, within a budget of time.

    python bench/train_all.py --minutes 180        # again after an interruption: goes on
    python bench/train_all.py --minutes 20 --scripts vae gan --labels

Each script gets an equal share of the minutes, and at least one epoch. The first start times a few
steps of each, plans the epochs that fit into nine tenths of its share (the rest is for tests,
samples and pictures), and keeps the plan in out/bench/plan.json, so that a later start goes on with
the same schedule; delete that file and out/<script> to plan and train anew. With --labels, all go
into out/<script>-labels and learn the labels, too: bench/compare.py measures what these draw.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = "rnn made wavenet pixelcnn gatedcnn transformer vae vqvae gan diffusion".split()


def seconds_an_epoch(script, images=60_000):
    """Times the loss and its gradients in bfloat16 on random images."""
    _, Model, _, batch_size, _ = importlib.import_module(script).main.__defaults__
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device, memory_format=torch.channels_last)
    x, times = torch.rand(batch_size, 1, 28, 28, device=device), []
    for _ in range(8):
        start = time.time()
        with torch.autocast(device, torch.bfloat16):
            loss, _ = model.loss(x)
        loss.backward()
        loss.item()  # waits for a GPU
        times.append(time.time() - start)
    return sorted(times)[len(times) // 2] * (images // batch_size)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--minutes", type=float, default=180, help="for all scripts together (%(default)s)")
    flag("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="(default: all ten)")
    flag("--labels", action="store_true", help="--class-cond for all, into out/<script>-labels")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    path = Path("out/bench/plan.json")
    plan = json.loads(path.read_text()) if path.exists() else {}
    for script in args.scripts:
        out = f"out/{script}" + "-labels" * args.labels
        if out not in plan:
            share = 0.9 * 60 * args.minutes / len(args.scripts)
            plan[out] = max(1, int(share / seconds_an_epoch(script)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan))
        model, epochs = Path(out, "model.pt"), plan[out]
        done = len(torch.load(model, "cpu", weights_only=True)["log"]) if model.exists() else 0
        if done >= epochs:
            print(f"{out}: all {epochs} epochs are done", flush=True)
            continue
        command = [sys.executable, str(ROOT / f"{script}.py"), "--epochs", str(epochs)]
        command += ["--out-dir", out, *["--class-cond"] * args.labels, *["--resume"] * (done > 0)]
        if subprocess.run(command).returncode:
            sys.exit(f"{script}.py stopped; start again to go on")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to go on")
