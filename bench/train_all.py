"""Train all ten scripts, one after another, with their default settings or within a time limit.

    python bench/train_all.py                      # run it again to continue
    python bench/train_all.py --minutes 180
    python bench/train_all.py --minutes 20 --scripts vae gan --labels

With --minutes, each script gets an equal share of these, and at least one epoch. The first start
times a few steps, a test and a grid of samples of each, plans the epochs that fit into nine tenths
of its share (the rest is for start and end), and keeps the plan in out/bench/plan.json, so that a
later start continues with the same schedule; delete that file and out/<script> to plan and train
anew. With --labels, all go into out/<script>-labels and learn the labels, too: bench/compare.py
measures what these draw. It is run at the end if all ten have been trained. --profile times 20
steps of each script instead, and says what they wait for: the launches of kernels, memory, or
arithmetic.
"""

import argparse
import copy
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SCRIPTS = "made pixelcnn gatedcnn rnn wavenet transformer vae vqvae gan diffusion".split()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trainer(script):
    """-> three functions: the script's own training step on random images, a test of 500 images,
    100 samples, each of which waits for its end; and the steps of an epoch of 60,000 images."""
    module = importlib.import_module(script)
    model = module.Model().to(DEVICE, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).to(DEVICE).eval().requires_grad_(False)
    optimizers = module.make_optimizers(model)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = module.LR / 100
    autocast = module.bfloat16_autocast(DEVICE)
    x = torch.rand(module.BATCH_SIZE, 1, 28, 28, device=DEVICE)
    images = torch.randint(256, (500, 1, 28, 28), dtype=torch.uint8, device=DEVICE)

    def step():
        loss = module.train_step(model, optimizers, autocast, x, None)
        module.update_ema(ema, model, 1000)
        return loss.item()

    def test():
        return module.evaluate(ema.loss, images, autocast)

    def sample():
        return ema.sample(100).sum().item()

    return step, test, sample, 60_000 // module.BATCH_SIZE


def seconds(function, n, warm_up=3):
    """Median of n calls, after some that do not count."""
    times = []
    for _ in range(warm_up + n):
        start = time.time()
        function()
        times.append(time.time() - start)
    return sorted(times[warm_up:])[n // 2]


class Counter(TorchDispatchMode):
    """Counts the operations of products and convolutions, forward and backward; not of LSTMs.
    (FlopCounterMode follows modules, too, and stops at the gradient that gan.py takes in its loss.)
    """

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def profile(script, peak):
    """Print what an epoch takes and what bounds it; peak: operations a second of a product."""
    step, _, _, steps = trainer(script)
    duration = seconds(step, 20)
    with Counter() as counter:
        step()
    with torch.profiler.profile() as profiler:
        for _ in range(20):
            step()
    share = counter.total / duration / peak
    kernels = [event.self_device_time_total for event in profiler.key_averages()
               if event.device_type != DeviceType.CPU and not event.is_user_annotation]  # fmt: skip
    busy = sum(kernels) / 20e6 / duration  # microseconds of 20 steps
    bound = "memory" if share < 0.2 else "arithmetic"
    bound = "launches" if DEVICE == "cuda" and busy < 0.7 else bound
    times = f"{1000 * duration:.1f} | {steps * duration:.1f}"
    print(f"| {script} | {times} | {busy:.0%} | {share:.1%} | {bound} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--minutes", type=float, help="for all scripts together (default: their own epochs)")
    flag("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS, help="(default: all ten)")
    flag("--labels", action="store_true", help="--class-cond for all, into out/<script>-labels")
    flag("--profile", action="store_true", help="no training: time 20 steps of each")
    args = parser.parse_args(argv)
    if args.profile:
        a = torch.randn(4096 if DEVICE == "cuda" else 1024, 4096, device=DEVICE).bfloat16()
        peak = 2 * len(a) ** 2 * 4096 / seconds(lambda: (a @ a.T).sum().item(), 10)
        print(f"a bf16 product makes {peak / 1e12:.3g} Tflop/s on this {DEVICE}\n\n"
              "| script | ms/step | s/epoch | GPU busy | share of product | bound by |\n"
              "|---|---|---|---|---|---|")  # fmt: skip
        for script in args.scripts:
            profile(script, peak)
        return
    if args.minutes is not None and args.minutes <= 0:
        parser.error("--minutes must be above 0")
    path = Path("out/bench/plan.json")
    plan = json.loads(path.read_text()) if path.exists() else {}
    for script in args.scripts:
        out = f"out/{script}-labels" if args.labels else f"out/{script}"
        if args.minutes is None:
            epochs = importlib.import_module(script).EPOCHS
        elif out in plan:
            epochs = plan[out]
        else:
            share = 0.9 * 60 * args.minutes / len(args.scripts)
            step, test, sample, steps = trainer(script)
            epoch = steps * seconds(step, 5) + 20 * seconds(test, 1, 1) + seconds(sample, 1, 1)
            epochs = plan[out] = max(1, int(share / epoch))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(plan))
        checkpoint = Path(out, "model.pt")
        done = 0
        if checkpoint.exists():
            done = len(torch.load(checkpoint, "cpu", weights_only=True)["log"])
        if done >= epochs:
            print(f"{out}: all {epochs} epochs are done", flush=True)
            continue
        command = [sys.executable, str(ROOT / f"{script}.py"), "--epochs", str(epochs)]
        command += ["--out-dir", out]
        if args.labels:
            command.append("--class-cond")
        if checkpoint.exists():
            command.append("--resume")
        if subprocess.run(command).returncode != 0:
            sys.exit(f"{script}.py stopped; start again to continue")
    if args.scripts == SCRIPTS and not args.labels:
        subprocess.run([sys.executable, str(ROOT / "bench/compare.py")])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a script would train on alone
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; start again to continue")
