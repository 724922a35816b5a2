"""The models themselves: losses, samplers, gradients, what they learn and what they refuse."""

import importlib
import inspect
import json
import math
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    AUTOREGRESSIVE,
    IMAGES,
    METRIC,
    ROOT,
    SCRIPTS,
    SIZES,
    binary,
    model_class,
    nll_of,
    perturb,
    tiny,
)


# ---------------------------------------------------------------- all ten
def test_copied_alone(tmp_path):
    """Each file, alone in a folder, imports, trains on the user's images, and samples; its main
    says what it is missing."""
    code = """if 1:
        import importlib, json, os, runpy, sys
        import torch
        scripts = json.loads(sys.argv.pop())
        for name, (Model, sizes) in scripts.items():
            os.chdir(name)
            sys.path[0] = os.getcwd()
            module = importlib.import_module(name)
            assert "common" not in sys.modules and "torchvision" not in sys.modules
            torch.manual_seed(0)
            model = getattr(module, Model)(**sizes)
            for p in model.parameters():
                p.data += 0.1 * torch.randn_like(p)
            loss, metrics = model.loss(torch.rand(4, 1, 28, 28), torch.arange(4))
            assert loss.ndim == 0 and all(m.ndim == 0 for m in metrics.values())
            loss.backward()
            assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
            model = getattr(module, Model)(**sizes, size=8)
            assert model.loss(torch.rand(2, 1, 8, 8))[0] > 0
            for n in 3, 1, 64:
                images = model.eval().sample(n)
                assert images.shape == (n, 1, 8, 8) and not images.requires_grad
                assert 0 <= images.min() and images.max() <= 1
            try:
                runpy.run_path(f"{name}.py", run_name="__main__")
            except SystemExit as stop:
                print(stop.code)
            os.chdir("..")
    """
    for name in SCRIPTS:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    todo = json.dumps({name: (model_class(name).__name__, SIZES[name]) for name in SCRIPTS})
    command = [sys.executable, "-B", "-c", code, todo]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    for name, line in zip(SCRIPTS, run.stdout.strip().split("\n")):
        assert line.startswith(f"{name}.py: error: ")
        assert "common" in line
        assert [path.name for path in (tmp_path / name).iterdir()] == [f"{name}.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_gpu_is_never_waited_for(name):
    """On the meta device nothing has a value: to read one raises, like most uses of the CPU."""
    model = tiny(name, size=4)
    model.loss(torch.rand(4, 1, 4, 4), torch.arange(4))  # the first images are looked at
    model.to("meta")
    x = torch.empty(4, 1, 4, 4, device="meta")
    y = torch.empty(4, dtype=torch.int64, device="meta")
    outputs = [model.sample(4, y), *model.pictures(x).values()]
    if name == "vae":
        outputs += model.bound(x, k=2)[1].values()
    for labels in None, y:
        loss, metrics = model.loss(x, labels)
        loss.backward()
        outputs += metrics.values()
    assert {output.device.type for output in outputs} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SCRIPTS)
def test_training_steps_on_cuda_wait_for_nothing(name):
    module = importlib.import_module(name)
    model = tiny(name).to("cuda", memory_format=torch.channels_last)
    ema = tiny(name).to("cuda").eval().requires_grad_(False)
    optimizers = module.make_optimizers(model)
    autocast = module.bfloat16_autocast("cuda")
    images, labels = (part[:64].cuda() for part in IMAGES[:2])
    module.train_step(model, optimizers, autocast, images / 255, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            loss = module.train_step(model, optimizers, autocast, images / 255, labels)
            module.update_ema(ema, model, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_gradient_depends_on_the_order_of_threads(name):
    """That of a large x[i] with repeated i does on a CPU, and resuming would not be exact."""
    todo = [tiny(name).loss(IMAGES[0][:4] / 255, IMAGES[1][:4])[0].grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert len(names) > 5
    assert not any("Index" in name for name in names), names


@pytest.mark.parametrize("name", SCRIPTS)
def test_wrong_images_and_labels_are_refused(name):
    model = tiny(name, size=16)
    good = torch.rand(4, 1, 16, 16)
    nan = good.clone()
    nan[0, 0, 0, 0] = math.nan
    for x in (2 * good - 1, 255 * good, nan):
        with pytest.raises(ValueError, match="must lie in"):
            model.loss(x)
    shapes = good[..., :8], good[:, 0], good.expand(4, 3, 16, 16), torch.rand(4, 1, 28, 28)
    for x in (*shapes, good[:0], good.round().byte(), good > 0.5):
        with pytest.raises(ValueError, match="x must be|x holds no"):
            model.loss(x)
    with pytest.raises(ValueError, match=r"0\.\.10"):
        model.loss(good, torch.tensor([0, 1, 2, 11]))
    with pytest.raises(ValueError, match=r"0\.\.10"):
        model.loss(good, torch.tensor([0, 1, 2, -1]))
    for y in (torch.arange(3), torch.arange(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="int64"):
            model.loss(good, y)
    assert model.loss(good, torch.tensor([0, 9, 3, 10]))[0].isfinite()  # 10: no label


@pytest.mark.parametrize("name", SCRIPTS)
def test_sizes_that_a_model_cannot_have_are_refused(name):
    Model = model_class(name)
    wrong = [{key: 0} for key, value in SIZES[name].items() if key not in ("n_layer", "n_inner")]
    wrong += [{"size": 0}, {"n_classes": -1}]
    if name in ("vae", "vqvae", "gan", "diffusion"):
        wrong += [{"size": 30}]
    if name in ("pixelcnn", "gatedcnn"):
        wrong += [{"kernel": 4}, {"n_layer": 0}]
    if name in ("transformer", "vqvae"):
        wrong += [{"n_embd": 15, "n_head": 2}, {"n_embd": 2, "n_head": 2}]
    if name == "vqvae":
        wrong += [{"code_dim": 2}]
    if name == "diffusion":
        wrong += [{"n_embd": 33}]
    for weight in {"gan": ["gamma"], "vqvae": ["beta", "rate_weight"]}.get(name, []):
        wrong += [{weight: -1.0}, {weight: math.nan}, {weight: math.inf}]
    for sizes in wrong:
        with pytest.raises(ValueError, match="must|needs"):
            Model(**sizes)


@pytest.mark.parametrize("name", ["vae", "gan", "diffusion"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_have_the_dtype_of_the_weights(name, dtype):
    images = tiny(name, size=8).to(dtype).eval().sample(2)
    assert images.dtype == dtype
    assert images.isfinite().all()


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "gan"])
def test_learns(name):
    """120 steps of 32 images, of 14 x 14 pixels for autoregressive models."""
    goal = dict(rnn=42, made=45, wavenet=44, pixelcnn=42, gatedcnn=45, transformer=40,
                vae=185, vqvae=165, diffusion=0.4)  # fmt: skip
    steps = 120
    size, stride = 28, 1
    if name in AUTOREGRESSIVE:
        size, stride = 14, 2
    model = tiny(name, size=size)
    train_x, test_x = (IMAGES[n][..., ::stride, ::stride] for n in (0, 2))
    module = importlib.import_module(name)
    optimizers = module.make_optimizers(model)
    autocast = torch.autocast("cpu", enabled=False)
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = module.LR * (1 - step / steps)
        x = train_x[torch.randint(4096, (32,))] / 255
        module.train_step(model, optimizers, autocast, x, None)
    model.eval().requires_grad_(False)
    test = module.evaluate(model.loss, test_x[:1000], autocast)
    print(name, test)
    assert test[METRIC[name]] < goal[name]


# ---------------------------------------------------------------- diffusion
def test_diffusion_marginals_and_both_ends():
    model = tiny("diffusion")
    x0 = torch.full((20_000, 1, 1, 1), 0.6)
    eps = torch.randn(20_000, 1, 1, 1)
    for t in (0.0, 0.25, 0.9, 1.0):
        x_t, v = model.diffuse(x0, torch.full((20_000,), t), eps)
        c, s = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        assert abs(x_t.mean() - 0.6 * c) < 0.03
        assert abs(x_t.std() - s) < 0.03
        torch.testing.assert_close(c * x_t - s * v, x0, atol=1e-5, rtol=0)
        torch.testing.assert_close(s * x_t + c * v, eps, atol=1e-5, rtol=0)
    times = []

    def forward(x_t, t, y, x0_last=None):
        times.append(t)
        return x_t

    model.forward = forward
    for _ in range(20):
        model.loss(torch.rand(128, 1, 28, 28))
    times = torch.stack(times[1::2])  # the other calls predict the x0_last of half of the images
    assert times.min() < 0.05
    assert 0.999 < times.max() <= 1
    assert abs(times.square().mean() - 0.5) < 0.005  # density 2 t


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.0), (-0.4, 0.5), (0.3, 2.0)])
def test_diffusion_sampler_recovers_a_gaussian(mean, std):
    """For data N(mean, std^2) the best v is known, and the ODE takes noise z to mean + std z."""
    model = tiny("diffusion").double()

    def best_v(x, t, y=None, x0_last=None):
        c, s = (t[0] * math.pi / 2).cos(), (t[0] * math.pi / 2).sin()
        surprise = (x - c * mean) / (c**2 * std**2 + s**2).clamp(min=1e-12)
        return c * s * surprise - s * (mean + c * std**2 * surprise)

    model.forward = best_v
    z = torch.linspace(-3, 3, 61, dtype=torch.float64).view(-1, 1, 1, 1)
    coarse, fine = (
        (model.move(z, 1, 0, steps) - (mean + std * z)).abs().max().item() for steps in (25, 100)
    )
    assert coarse < 0.03
    assert fine < max(coarse / 8, 1e-6)
    if std > 0:  # and backwards: from data to its noise
        back = model.move(mean + std * z, 0, 1, 100)
        assert (back - z).abs().max() < 0.02
    noise = torch.randn(20_000, 1, 1, 1, dtype=torch.float64)
    for fresh in (0.5, 1.0):  # not each noise on its own, but all together
        x = model.move(noise, 1, 0, 100, fresh=fresh)
        assert abs(x.mean() - mean) < 0.03 * std + 1e-3
        assert abs(x.std() - std) < 0.03 * std + 1e-3
        if std > 0:
            assert abs(torch.corrcoef(torch.cat([x.flatten(1).T, noise.flatten(1).T]))[0, 1]) < 0.9


def test_diffusion_with_all_noise_fresh_is_ddpm(monkeypatch):
    """A step then draws from q(x_b | x_a, x0), for the x0 that is predicted."""
    model = perturb(tiny("diffusion")).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    start, end = 0.7, 0.4
    a, b = start * math.pi / 2, end * math.pi / 2
    v = model(x, torch.full((2,), start, dtype=torch.float64))
    x0 = math.cos(a) * x - math.sin(a) * v
    # x_a = r x_b + s noise, with r = cos(a) / cos(b); Bayes' rule for the two Gaussians
    r = math.cos(a) / math.cos(b)
    s_squared = math.sin(a) ** 2 - (r * math.sin(b)) ** 2
    variance = 1 / (r**2 / s_squared + 1 / math.sin(b) ** 2)
    mean = variance * (r / s_squared * x + math.cos(b) / math.sin(b) ** 2 * x0)
    for noise in (0.0, 1.0):
        monkeypatch.setattr(
            torch, "randn_like", lambda eps, noise=noise: torch.full_like(eps, noise)
        )
        step = model.move(x, start, end, 1, fresh=1.0)
        torch.testing.assert_close(step, mean + noise * variance**0.5)


def test_diffusion_ends_at_its_end_from_any_start():
    """Times are not exact, but the last step ends at 0: just the image, without any noise."""
    model = perturb(tiny("diffusion", size=4))
    for start in (0.1, 0.3, 0.7):
        for steps in (3, 6, 12, 24):
            frames = []
            x = torch.randn(1, 1, 4, 4)
            end = model.move(x, start, 0, steps, fresh=0.25, frames=frames)
            _, x0 = frames[-1]
            assert torch.equal(end, x0)


def test_diffusion_sees_its_last_prediction():
    """In training, every second image is shown the x0 that the network predicts without it."""
    model = perturb(tiny("diffusion"))
    calls = []
    forward = model.forward

    def watched(x_t, t, y=None, x0_last=None):
        v = forward(x_t, t, y, x0_last)
        calls.append((x_t, t, y, x0_last, v))
        return v

    model.forward = watched
    y = torch.arange(8)
    model.eval().loss(IMAGES[0][:8] / 255, y)
    (x_t, t, y_half, nothing, v), (all_x_t, all_t, _, x0_last, _) = calls
    assert nothing is None
    assert torch.equal(x_t, all_x_t[::2]) and torch.equal(t, all_t[::2])
    assert torch.equal(y_half, y[::2])
    a = t[:, None, None, None] * math.pi / 2
    torch.testing.assert_close(x0_last[::2], a.cos() * x_t - a.sin() * v)
    assert not x0_last[1::2].any() and not x0_last.requires_grad
    # in sampling, all images are, from the second step on
    calls.clear()
    model.sample(2, steps=3)
    assert calls[0][3] is None
    for before, after in zip(calls, calls[1:]):
        a = before[1][0] * math.pi / 2
        torch.testing.assert_close(after[3], a.cos() * before[0] - a.sin() * before[4])


def test_diffusion_guidance():
    model = perturb(tiny("diffusion"))
    x, y = torch.randn(3, 1, 28, 28), torch.tensor([1, 2, 3])
    plain = model.move(x, 1, 0, 1)
    label = model.move(x, 1, 0, 1, y, guidance=1)
    torch.testing.assert_close(model.move(x, 1, 0, 1, y, guidance=0), plain)
    torch.testing.assert_close(
        model.move(x, 1, 0, 1, y, guidance=3), plain + 3 * (label - plain), rtol=1e-4, atol=1e-4
    )
    assert (label - plain).abs().max() > 1e-3


def test_diffusion_frames_do_not_alias():
    process = tiny("diffusion").pictures(IMAGES[2][:4] / 255)["process"]
    assert process.shape == (25, 4, 1, 28, 56)
    assert (process[0] != process[-1]).any()


# ---------------------------------------------------------------- vqvae
def test_vqvae_each_term_moves_its_own_part():
    """The rest of the model has no gradient from it, or one of 0 up to rounding."""
    model = perturb(tiny("vqvae")).double().eval()
    x = binary(5, 1, 28, 28).double()
    model.codebook.data.normal_()
    names, weights = zip(*model.named_parameters())

    def moved(term):
        grads = torch.autograd.grad(term, weights, allow_unused=True, retain_graph=True)
        moving = [grad is not None and grad.abs().max() > 1e-9 for grad in grads]
        return {name.split(".")[0] for name, moves in zip(names, moving) if moves}

    losses = []
    for model.rate_weight in (0, 1):
        torch.manual_seed(1)
        losses.append(model.loss(x))
    (without, terms), (loss, _) = losses
    encoder, transformer = {"encoder", "offset"}, {"label", "token", "pos_emb", "blocks", "head"}
    assert moved(terms["recon"]) == encoder | {"decoder"}
    assert moved(terms["commit"]) == encoder
    assert moved(terms["prior"]) == transformer
    codebook = without - terms["recon"] - terms["prior"] - model.beta * terms["commit"]
    assert abs(codebook - terms["commit"]) < 1e-9  # of the same value
    assert model.beta == 0.25
    assert moved(codebook) == {"codebook"}
    grads = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (loss, without)]
    rate = {n.split(".")[0] for n, a, b in zip(names, *grads) if (a - b).abs().max() > 1e-9}
    assert rate == encoder

    # straight-through: the encoder gets the gradient that recon has at z_q, unchanged
    z_e, codes, *_ = model(x)
    z_q = model.codebook[codes].detach().requires_grad_()
    nll = nll_of(model.decode(z_q), x)
    torch.testing.assert_close(nll, terms["recon"])
    slope = torch.autograd.grad(nll, z_q)
    expected = torch.autograd.grad(z_e, model.offset, slope)
    torch.testing.assert_close(torch.autograd.grad(terms["recon"], model.offset), expected)


def test_vqvae_collapsed_codebook_recovers():
    model = tiny("vqvae")
    x = IMAGES[0][:64] / 255
    model.codebook.data[:] = 100 * torch.randn(4)  # all z_e have the same nearest code
    model.usage.copy_(8 * F.one_hot(torch.tensor(0), 8))
    assert model.eval().loss(x)[1]["perplexity"] == 1
    assert model.train().loss(x)[1]["perplexity"] > 5
    before = model.codebook.detach().clone()
    model.eval().loss(x)
    assert torch.equal(model.codebook, before)  # only training moves codes


# ---------------------------------------------------------------- gan
def test_gan_losses_and_whom_they_move():
    model = perturb(tiny("gan", gamma=3.0), 0.05).eval()
    x = torch.rand(6, 1, 28, 28)
    discriminator, generator = model.discriminator, model.generator
    y = torch.full((6,), 10)
    torch.manual_seed(1)
    d_loss, d_metrics = model.d_loss(x)
    d_loss.backward()
    assert all(p.grad.any() for p in discriminator.parameters())
    assert all(p.grad is None for p in generator.parameters())
    torch.manual_seed(1)
    real, fake = discriminator(2 * x - 1, y), discriminator(model(y), y)
    coin = F.binary_cross_entropy_with_logits
    r1 = 0
    for one in 2 * x - 1:
        slope = torch.autograd.functional.jacobian(lambda x: discriminator(x[None], y[:1]), one)
        r1 += slope.square().sum() / 6
    expected = coin(real, torch.ones(6)) + coin(fake, torch.zeros(6)) + 3 / 2 * r1
    torch.testing.assert_close(d_loss, expected)
    torch.testing.assert_close(d_metrics["d_fake"], fake.sigmoid().mean().detach())
    torch.manual_seed(1)
    g_loss, _ = model.g_loss(x)
    torch.testing.assert_close(g_loss, coin(fake, torch.ones(6)))
    assert r1 > 1e-4
    assert model.loss(x)[1].keys() == {"d_loss", "g_loss", "d_real", "d_fake"}


def test_gan_step_moves_one_player_after_the_other(monkeypatch):
    """What changes in each optimizer's step: the discriminator first, then the generator."""
    module = importlib.import_module("gan")
    model = tiny("gan")
    moved = []
    adamw_step = torch.optim.AdamW.step

    def watched_step(self, *args):
        before = [p.detach().clone() for p in model.parameters()]
        adamw_step(self, *args)
        pairs = zip(model.named_parameters(), before)
        moved.append({name.split(".")[0] for (name, p), old in pairs if (p != old).any()})

    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    optimizers = module.make_optimizers(model)
    autocast = torch.autocast("cpu", enabled=False)
    for _ in range(3):
        module.train_step(model, optimizers, autocast, IMAGES[0][:32] / 255, None)
    assert moved == [{"discriminator"}, {"generator"}] * 3


def test_gan_sample_of_a_seed_does_not_depend_on_how_many_are_drawn():
    model = tiny("gan").eval()
    torch.manual_seed(0)
    few = model.sample(16)
    torch.manual_seed(0)
    torch.testing.assert_close(model.sample(32)[:16], few)


def test_gan_reaches_every_digit():
    judge = runpy.run_path(str(ROOT / "bench/classifier.py"))["load_classifier"]()
    module = importlib.import_module("gan")
    torch.manual_seed(0)
    model = module.GAN(channels=16)
    optimizers = module.make_optimizers(model)
    autocast = torch.autocast("cpu", enabled=False)
    for step in range(150):
        x = IMAGES[0][torch.randint(60_000, (32,))] / 255
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 10, 2 - step / 75)
        module.train_step(model, optimizers, autocast, x, None)
    digits = judge(model.eval().sample(1000)).argmax(1).bincount(minlength=10)
    assert digits.min() >= 10, digits


# ---------------------------------------------------------------- the same text
def test_blocks_of_the_same_name_are_the_same_text():
    """Classes and functions above the train section, and the methods that models have in common."""
    shared = {"check": SCRIPTS, "embed": SCRIPTS}
    shared |= {"loss": AUTOREGRESSIVE, "sample": AUTOREGRESSIVE}
    shared |= {"tokens": ["rnn", "transformer"], "new_cache": ["transformer"]}
    shared["pictures"] = ["rnn", "made", "wavenet", "transformer"]
    for method, names in shared.items():
        methods = [getattr(model_class(name), method, None) for name in names]
        texts = {inspect.getsource(function) for function in methods if function is not None}
        assert len(texts) == 1, method
    assert inspect.getsource(model_class("pixelcnn").pictures) == inspect.getsource(
        model_class("gatedcnn").pictures
    )
    assert inspect.getsource(importlib.import_module("vae").ResBlock) == inspect.getsource(
        importlib.import_module("diffusion").ResBlock
    )
    assert inspect.getsource(importlib.import_module("transformer").Block) == inspect.getsource(
        importlib.import_module("vqvae").Block
    )
