"""The models themselves: losses, samplers, gradients, what they learn and what they refuse."""

import copy
import importlib
import inspect
import math
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from classifier import load_classifier
from helpers import (
    AUTOREGRESSIVE,
    IMAGES,
    METRIC,
    ROOT,
    SCRIPTS,
    SIZES,
    SMALL,
    binary,
    model_class,
    nll_of,
    perturb,
    tiny,
)

import diffusion
import gan

ten = pytest.mark.parametrize("name", SCRIPTS)
FLOAT32 = torch.autocast("cpu", enabled=False)


def watch(model, name):
    """From now on, record the calls of a method -> [{argument: value, "result": value}, ...]."""
    method = getattr(model, name)
    calls = []

    def watched(*args, **kwargs):
        call = inspect.signature(method).bind(*args, **kwargs)
        call.apply_defaults()
        result = method(*args, **kwargs)
        calls.append({**call.arguments, "result": result})
        return result

    setattr(model, name, watched)
    return calls


def moved(model, step):
    """The names of the weights that step() changes."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    step()
    return {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}


# ---------------------------------------------------------------- alone
@ten
def test_a_copy_needs_nothing_but_torch(name, monkeypatch, tmp_path):
    for module in ("common", "numpy", "PIL", "torchvision", *SCRIPTS):
        monkeypatch.setitem(sys.modules, module, None)  # to import it is an error
    path = shutil.copy(ROOT / f"{name}.py", tmp_path)
    torch.manual_seed(0)
    model = runpy.run_path(path)["Model"](**SIZES[name], size=8)
    model = perturb(model, 0.1).eval()
    model.loss(torch.rand(4, 1, 8, 8))[0].backward()
    for p in model.parameters():
        assert p.grad.isfinite().all()
        assert p.grad.any()
    for n in (3, 1, 64):
        images = model.sample(n)
        assert images.shape == (n, 1, 8, 8)
        assert not images.requires_grad
        assert 0 <= images.min() <= images.max() <= 1


def test_main_of_a_copy_says_what_is_missing(tmp_path):
    shutil.copy(ROOT / "vae.py", tmp_path)
    command = [sys.executable, "-B", "vae.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "common.py must be beside this script" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["vae.py"]


# ---------------------------------------------------------------- devices and threads
@ten
@pytest.mark.parametrize("n_classes", [0, 10])
def test_a_loss_waits_for_no_gpu(name, n_classes):
    """On the meta device nothing has a value: to read one raises, like most uses of the CPU."""
    model = tiny(name, size=4, n_classes=n_classes).to("meta")
    model.train(name != "gan")
    x = torch.empty(4, 1, 4, 4, device="meta")
    y = torch.empty(4, dtype=torch.int64, device="meta") if n_classes > 0 else None
    for _ in range(8 if name == "diffusion" else 1):  # it tosses a coin
        loss, metrics = model.loss(x, y)
        loss.backward()
        assert {value.device.type for value in metrics.values()} == {"meta"}


@ten
def test_all_that_is_drawn_is_on_the_device_of_the_model(name):
    model = tiny(name, size=4, n_classes=10).eval().to("meta")
    x = torch.empty(4, 1, 4, 4, device="meta")
    y = torch.empty(4, dtype=torch.int64, device="meta")
    if name == "diffusion":  # hundreds of passes, and one is slow on this device
        model.forward = lambda x_t, *_: torch.zeros_like(x_t)
    outputs = [model.sample(4, y), *model.pictures(x, y).values()]
    if name == "vae":
        outputs.append(model.bound(x, y, k=2))
    assert {output.device.type for output in outputs} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ten
def test_training_steps_on_cuda_wait_for_nothing(name):
    module = importlib.import_module(name)
    model = tiny(name, n_classes=10).to("cuda", memory_format=torch.channels_last)
    ema = tiny(name, n_classes=10).to("cuda").eval().requires_grad_(False)
    optimizers = module.make_optimizers(model, 1e-3)
    autocast = module.bfloat16_autocast("cuda")
    x, y = (part[:64].cuda() for part in IMAGES[:2])
    module.train_step(model, optimizers, autocast, x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 8):
            loss = module.train_step(model, optimizers, autocast, x, y)
            module.update_ema(ema, model, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@ten
def test_no_gradient_depends_on_the_order_of_threads(name):
    """That of a large x[i] with repeated i does on a CPU, and resuming would not be exact."""
    model = tiny(name, n_classes=10)
    model.train(name != "gan")
    todo = [model.loss(IMAGES[0][:4], IMAGES[1][:4])[0].grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert len(names) > 5
    assert not any("Index" in name for name in names), names


# ---------------------------------------------------------------- what a loss returns and refuses
@ten
def test_metrics_are_scalars_without_a_graph(name):
    loss, metrics = tiny(name, size=8).eval().loss(torch.rand(4, 1, 8, 8))
    assert loss.requires_grad
    assert METRIC[name] in metrics
    for value in (loss, *metrics.values()):
        assert value.shape == ()
    assert not any(value.requires_grad for value in metrics.values())


@ten
def test_images_of_another_shape_are_refused(name):
    model = tiny(name, size=16).eval()
    x = torch.rand(4, 1, 16, 16)
    for wrong in (x[..., :8], x[:, 0], x.expand(4, 3, 16, 16), torch.rand(4, 1, 28, 28)):
        with pytest.raises(ValueError, match="must be .B, 1, 16, 16."):
            model.loss(wrong)


@ten
def test_values_outside_0_and_1_are_refused(name):
    model = tiny(name, size=16).eval()
    x = torch.rand(4, 1, 16, 16)
    nan = x.clone()
    nan[0, 0, 0, 0] = math.nan
    for wrong in (2 * x - 1, 255 * x, nan):
        with pytest.raises((ValueError, RuntimeError), match=r"\[0, 1\]|p_in <= 1"):
            model.loss(wrong)


@ten
def test_a_model_made_without_labels_refuses_them(name):
    model = tiny(name, size=8).eval()
    y = torch.tensor([3, 1, 4])
    with pytest.raises(ValueError, match="n_classes is 0"):
        model.loss(torch.rand(3, 1, 8, 8), y)
    with pytest.raises(ValueError, match="n_classes is 0"):
        model.sample(3, y)


@ten
def test_a_model_made_with_labels_needs_one_for_each_image(name):
    model = tiny(name, size=8, n_classes=10).eval()
    for y in (None, torch.tensor([3]), torch.tensor([3, 1, 4, 1])):
        with pytest.raises(ValueError, match="must hold 3 labels"):
            model.loss(torch.rand(3, 1, 8, 8), y)
        with pytest.raises(ValueError, match="must hold 3 labels"):
            model.sample(3, y)


@ten
def test_labels_change_the_loss_and_the_samples(name):
    model = perturb(tiny(name, size=8, n_classes=10)).eval()
    x = binary(6, 1, 8, 8)
    results = []
    for y in (torch.full((6,), 3), torch.full((6,), 7)):
        torch.manual_seed(1)
        results.append((model.loss(x, y)[0], model.sample(6, y)))
    (loss, images), (other_loss, other_images) = results
    assert loss != other_loss
    assert not torch.equal(images, other_images)


WRONG_SIZES = {
    "rnn": [dict(n_embd=0), dict(n_layer=0)],
    "made": [dict(hidden=0)],
    "wavenet": [dict(channels=0)],
    "pixelcnn": [dict(channels=0), dict(channels=5), dict(kernel=4), dict(n_layer=0)],
    "gatedcnn": [dict(channels=0), dict(kernel=1), dict(kernel=4), dict(n_layer=0)],
    "transformer": [dict(n_head=0), dict(n_embd=15), dict(n_embd=2), dict(n_layer=0)],
    "vae": [dict(channels=0), dict(hidden=0), dict(z_dim=0), dict(size=30), dict(size=0)],
    "vqvae": [dict(n_codes=0), dict(code_dim=2), dict(n_head=0), dict(n_head=3), dict(size=30)],
    "gan": [dict(channels=0), dict(z_dim=0), dict(size=30), dict(size=0)],
    "diffusion": [dict(channels=0), dict(n_embd=0), dict(n_embd=33), dict(size=30), dict(size=0)],
}


@ten
def test_sizes_that_a_model_cannot_have_are_refused(name):
    for sizes in WRONG_SIZES[name]:
        with pytest.raises(ValueError, match="must be"):
            tiny(name, **sizes)


@pytest.mark.parametrize("name", ["vae", "gan", "diffusion"])
def test_a_row_of_an_interpolation_has_the_label_of_its_first_image(name):
    model = tiny(name, size=8, n_classes=10).eval()
    if name == "vae":
        calls = watch(model, "decode")
    else:
        calls = watch(model.generator if name == "gan" else model, "forward")
    model.pictures(torch.rand(3, 1, 8, 8), torch.tensor([3, 1, 4]))
    labels = [call["y"].tolist() for call in calls if len(call["y"]) == 30]
    assert [3] * 10 + [1] * 10 + [4] * 10 in labels


# ---------------------------------------------------------------- training
def train(name, model, lr):
    """One training step on random images. Nothing but lr sets the learning rate."""
    module = importlib.import_module(name)
    optimizers = module.make_optimizers(model, lr)
    module.train_step(model, optimizers, FLOAT32, torch.rand(8, 1, 8, 8), torch.arange(8))


@ten
def test_weights_move_at_the_rate_that_the_optimizers_were_made_with(name):
    model = perturb(tiny(name, size=8, n_classes=10))
    if name == "vqvae":
        model.usage.fill_(1)  # no restarts, which move vectors at any rate
    assert moved(model, lambda: train(name, model, 0.0)) == set()
    assert moved(model, lambda: train(name, model, 1e-3)) == set(dict(model.named_parameters()))


@ten
def test_weights_that_require_no_gradient_stay_as_they_are(name):
    model = perturb(tiny(name, size=8, n_classes=10))
    weights = list(model.named_parameters())
    for _, p in weights[::3]:
        p.requires_grad_(False)
    expected = {key for key, p in weights if p.requires_grad}
    assert moved(model, lambda: train(name, model, 1e-3)) == expected
    for optimizer in importlib.import_module(name).make_optimizers(model, 1e-3):
        for group in optimizer.param_groups:
            assert all(p.requires_grad for p in group["params"])


@pytest.mark.parametrize("name", ["rnn", "wavenet", "pixelcnn", "gatedcnn", "transformer"])
def test_blocks_may_be_frozen_as_a_whole(name):
    module = importlib.import_module(name)
    model = tiny(name, size=8)
    model.blocks.requires_grad_(False)
    before = copy.deepcopy(model.blocks.state_dict())
    optimizers = module.make_optimizers(model, 1e-2)
    x = torch.rand(4, 1, 8, 8)
    head = model.head.weight.clone()
    module.train_step(model, optimizers, module.bfloat16_autocast("cpu"), x, None)
    assert not torch.equal(model.head.weight, head)
    assert all(
        torch.equal(weight, before[key]) for key, weight in model.blocks.state_dict().items()
    )


# To know of each pixel how often it is white costs 37.6 nats for small images, 206 for whole ones.
GOALS = dict.fromkeys(AUTOREGRESSIVE, 37) | {"vae": 200, "vqvae": 200, "diffusion": 0.45}


@pytest.mark.parametrize("name", GOALS)
def test_learns(name):
    train_x, _, test_x, _ = SMALL if name in AUTOREGRESSIVE else IMAGES
    model = tiny(name, size=train_x.shape[-1])
    module = importlib.import_module(name)
    optimizers = module.make_optimizers(model, module.LR)
    for step in range(100):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = module.LR * (1 - step / 100)
        x = train_x[torch.randint(4096, (24,))]
        module.train_step(model, optimizers, FLOAT32, x, None)
    metrics = module.evaluate(model.eval(), test_x[::10], None)
    print(name, metrics)
    assert metrics[METRIC[name]] < GOALS[name]


# ---------------------------------------------------------------- vqvae
def small_vqvae():
    """A VQVAE with random weights, and images for it."""
    return perturb(tiny("vqvae", size=8)).eval(), binary(16, 1, 8, 8)


def gradients(model, x):
    """Of the loss, by the names of the weights."""
    weights = dict(model.named_parameters())
    loss, _ = model.loss(x)
    return dict(zip(weights, torch.autograd.grad(loss, weights.values())))


def test_vqvae_loss_is_the_sum_of_its_terms():
    model, x = small_vqvae()
    z_e = model.encode(x)
    distance = (z_e[:, :, None] - model.codebook).square().sum(3)  # (16, 4, n_codes)
    codes = distance.argmin(2)
    log_p = model.prior(codes).log_softmax(2)
    recon = nll_of(model.decode(model.codebook[codes]), x)
    prior = -log_p.gather(2, codes[..., None]).sum() / 16
    commit = distance.amin(2).sum() / 16  # the codebook's loss has the same value
    rate = -((-distance).softmax(2) * log_p).sum() / 16
    loss, metrics = model.loss(x)
    torch.testing.assert_close(loss, recon + commit + 0.25 * commit + prior + 0.5 * rate)
    expected = {"neg_elbo": recon + prior, "recon": recon, "prior": prior, "commit": commit}
    torch.testing.assert_close({key: metrics[key] for key in expected}, expected)


@pytest.mark.parametrize("weight", ["beta", "rate_weight"])
def test_vqvae_commit_and_rate_move_the_encoder_alone(weight):
    model, x = small_vqvae()
    before = gradients(model, x)
    setattr(model, weight, 3)
    after = gradients(model, x)
    moved = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"encoder", "offset"}


def test_vqvae_gradient_of_recon_passes_the_quantiser_unchanged():
    model, x = small_vqvae()
    model.beta = model.rate_weight = 0
    z_e = model.encode(x)
    z_q = model.codebook[model.quantise(z_e)].detach().requires_grad_()
    slope = torch.autograd.grad(nll_of(model.decode(z_q), x), z_q)
    expected = torch.autograd.grad(z_e, model.offset, slope)[0]
    torch.testing.assert_close(gradients(model, x)["offset"], expected)


def test_vqvae_vectors_are_drawn_to_the_z_e_that_chose_them():
    model, x = small_vqvae()
    z_e = model.encode(x)
    codes = model.quantise(z_e)
    expected = torch.zeros_like(model.codebook)
    for k, vector in enumerate(model.codebook):
        expected[k] = 2 * (vector - z_e[codes == k]).sum(0) / 16
    torch.testing.assert_close(gradients(model, x)["codebook"], expected)


def test_vqvae_decoder_and_prior_learn_from_their_own_terms():
    model, x = small_vqvae()
    codes = model.quantise(model.encode(x))
    recon = nll_of(model.decode(model.codebook[codes].detach()), x)
    prior = F.cross_entropy(model.prior(codes).flatten(0, 1), codes.flatten(), reduction="sum") / 16
    grads = gradients(model, x)
    for key, p in model.named_parameters():
        part = key.split(".")[0]
        if part not in ("encoder", "offset", "codebook"):
            term = recon if part == "decoder" else prior
            expected = torch.autograd.grad(term, p, retain_graph=True)[0]
            torch.testing.assert_close(grads[key], expected)


def test_vqvae_takes_its_codebook_from_the_first_batch():
    model = tiny("vqvae", size=8)
    calls = watch(model, "encode")
    model.loss(torch.rand(64, 1, 8, 8))
    nearest = torch.cdist(model.codebook, calls[0]["result"].flatten(0, 1)).amin(1)
    torch.testing.assert_close(nearest, torch.zeros(8), atol=1e-3, rtol=0)
    before = model.codebook.clone()
    model.loss(torch.rand(64, 1, 8, 8))
    assert torch.equal(model.codebook, before)


def test_vqvae_collapsed_codebook_recovers_in_training():
    model = tiny("vqvae")
    x = IMAGES[0][:64]
    model.codebook.data[:] = 100 * torch.randn(4)  # all z_e have the same nearest code
    model.usage.copy_(8 * F.one_hot(torch.tensor(0), 8))
    assert model.eval().loss(x)[1]["perplexity"] == 1
    assert model.train().loss(x)[1]["perplexity"] > 5


def test_vqvae_vectors_stay_in_evaluation_and_if_they_are_frozen():
    model = tiny("vqvae", size=8).eval()
    model.usage.zero_()
    assert moved(model, lambda: model.loss(torch.rand(4, 1, 8, 8))) == set()
    assert not model.usage.any()
    model.train().codebook.requires_grad = False  # frozen
    assert moved(model, lambda: model.loss(torch.rand(4, 1, 8, 8))) == set()


# ---------------------------------------------------------------- gan
@pytest.mark.parametrize("n_classes", [0, 10])
def test_gan_losses_are_those_of_the_header(n_classes):
    model = perturb(tiny("gan", size=8, gamma=3.0, n_classes=n_classes), 0.05)
    x = torch.rand(6, 1, 8, 8)
    y = torch.arange(6) if n_classes > 0 else None

    def judge(x):
        return model.discriminator(x, y)

    torch.manual_seed(1)
    real, fake = judge(2 * x - 1), judge(model(6, y))
    r1 = torch.autograd.functional.jacobian(judge, 2 * x - 1).square().sum() / 6
    assert r1 > 1e-3
    torch.manual_seed(1)
    d_loss, _ = model.d_loss(x, y)
    expected = -(real.sigmoid().log() + (1 - fake.sigmoid()).log()).mean() + 3 / 2 * r1
    torch.testing.assert_close(d_loss, expected)
    torch.manual_seed(1)
    g_loss, _ = model.g_loss(6, y)
    torch.testing.assert_close(g_loss, -fake.sigmoid().log().mean())


def test_gan_has_no_loss_to_train_on():
    model = tiny("gan", size=8)
    x = torch.rand(6, 1, 8, 8)
    with pytest.raises(ValueError, match="d_loss and g_loss in turn"):
        model.loss(x)
    with torch.no_grad():  # as in evaluation
        _, metrics = model.eval().loss(x)
    assert metrics.keys() == {"d_loss", "g_loss", "d_real", "d_fake"}


def test_gan_discriminator_has_an_answer_for_each_label():
    model = tiny("gan", size=8, n_classes=10)
    x = torch.randn(1, 1, 8, 8).expand(10, 1, 8, 8)
    assert len(model.discriminator(x, torch.arange(10)).unique()) == 10


def step_by_hand(optimizer, loss):
    """As README.md tells to do."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_gan_losses_in_turn_move_one_player_after_the_other():
    model = perturb(tiny("gan", size=8), 0.05)
    d_optimizer, g_optimizer = gan.make_optimizers(model, 1e-3)
    x = torch.rand(8, 1, 8, 8)
    weights = {key for key, _ in model.named_parameters()}
    d_moved = moved(model, lambda: step_by_hand(d_optimizer, model.d_loss(x)[0]))
    g_moved = moved(model, lambda: step_by_hand(g_optimizer, model.g_loss(8)[0]))
    assert d_moved == {key for key in weights if key.startswith("discriminator.")}
    assert g_moved == weights - d_moved


def test_gan_train_step_is_these_two_steps():
    x = torch.rand(8, 1, 8, 8)
    models = [perturb(tiny("gan", size=8), 0.05) for _ in range(2)]
    d_optimizer, g_optimizer = gan.make_optimizers(models[0], 1e-3)
    torch.manual_seed(1)
    step_by_hand(d_optimizer, models[0].d_loss(x)[0])
    step_by_hand(g_optimizer, models[0].g_loss(8)[0])
    torch.manual_seed(1)
    gan.train_step(models[1], gan.make_optimizers(models[1], 1e-3), FLOAT32, x, None)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_gan_discriminator_is_trained_on_fakes_without_gradients():
    model = perturb(tiny("gan", size=8), 0.05)
    model.d_loss(torch.rand(8, 1, 8, 8))[0].backward()
    assert all(p.grad.any() for p in model.discriminator.parameters())
    assert all(p.grad is None for p in model.generator.parameters())


def test_gan_sample_of_a_seed_does_not_depend_on_how_many_are_drawn():
    model = tiny("gan").eval()
    torch.manual_seed(0)
    few = model.sample(16)
    torch.manual_seed(0)
    torch.testing.assert_close(model.sample(32)[:16], few)


def test_gan_reaches_every_digit():
    torch.manual_seed(0)
    model = gan.GAN(channels=8)
    optimizers = gan.make_optimizers(model, 4e-3)
    for step in range(200):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 10, 2 - step / 100)
        x = IMAGES[0][torch.randint(60_000, (24,))]
        gan.train_step(model, optimizers, FLOAT32, x, None)
    digits = load_classifier()(model.eval().sample(500)).argmax(1).bincount(minlength=10)
    assert digits.min() >= 3, digits


# ---------------------------------------------------------------- diffusion
def small_diffusion(**changes):
    return perturb(tiny("diffusion", **{"size": 8, **changes}))


def best_v(mean, std):
    """The forward of a network that has learned all about data of N(mean, std^2)."""

    def forward(x_t, t, y=None, x0_last=None):
        c = (t * math.pi / 2).cos().view(-1, 1, 1, 1)
        s = (t * math.pi / 2).sin().view(-1, 1, 1, 1)
        surprise = (x_t - c * mean) / (c**2 * std**2 + s**2).clamp(min=1e-12)
        x0 = mean + c * std**2 * surprise  # E[x0 | x_t]
        eps = s * surprise  # E[eps | x_t]
        return c * eps - s * x0

    return forward


def test_diffusion_mixes_images_and_noise_along_an_arc():
    model = small_diffusion()
    x0 = torch.full((20_000, 1, 1, 1), 0.6)
    for t in (0.0, 0.25, 0.9, 1.0):
        x_t = model.mix(x0, torch.randn_like(x0), torch.full((20_000,), t))
        assert abs(x_t.mean() - 0.6 * math.cos(t * math.pi / 2)) < 0.03
        assert abs(x_t.std() - math.sin(t * math.pi / 2)) < 0.03


def test_diffusion_split_undoes_mix_if_v_is_the_velocity(float64):
    model = small_diffusion()
    x0, eps = torch.randn(2, 9, 1, 8, 8)
    t = torch.linspace(0, 1, 9)
    ones = torch.full((9,), 2 / math.pi)  # of t, so that the angle moves at a speed of 1
    x_t, v = torch.autograd.functional.jvp(lambda t: model.mix(x0, eps, t), t, ones)
    torch.testing.assert_close(model.split(x_t, v, t), (x0, eps))


def test_diffusion_that_knows_the_only_image_has_no_loss_and_draws_it(float64):
    model = small_diffusion()
    model.forward = best_v(0.4, 0.0)
    x = torch.full((6, 1, 8, 8), 0.7)  # which is 0.4 in [-1, 1]
    for _ in range(20):
        assert model.loss(x)[0] < 1e-9
    torch.testing.assert_close(model.sample(6), x)


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_diffusion_trains_each_image_at_all_times(batch):
    """Even if the batch is always the same. t has density 2 t, so t^2 is uniform."""
    model = small_diffusion(size=4)
    x = torch.rand(batch, 1, 4, 4)
    calls = watch(model, "forward")
    times = []
    for _ in range(400):
        model.loss(x)
        times.append(calls[-1]["t"])
    u = torch.stack(times).square().sort(0).values  # (400, batch)
    assert (u - torch.linspace(0, 1, len(u))[:, None]).abs().max() < 0.08


def test_diffusion_spreads_the_times_of_a_batch_evenly():
    model = small_diffusion()
    calls = watch(model, "forward")
    model.loss(torch.rand(64, 1, 8, 8))
    gaps = calls[-1]["t"].square().sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((63,), 1 / 64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_diffusion_shows_a_prediction_in_half_of_the_batches(batch):
    model = small_diffusion(size=4)
    calls = watch(model, "forward")
    for _ in range(400):
        model.loss(torch.rand(batch, 1, 4, 4))
    shown = [call["x0_last"] is not None for call in calls]
    assert shown.count(False) == 400
    assert 160 < shown.count(True) < 240


def test_diffusion_shows_what_it_predicts_one_step_before():
    model = small_diffusion(n_classes=10).eval()
    calls = watch(model, "forward")
    x = torch.rand(8, 1, 8, 8)
    while not calls or calls[-1]["x0_last"] is None:
        model.loss(x, torch.arange(8))
    first, second = calls[-2:]
    assert torch.equal(first["y"], second["y"])
    one_step = first["t"].asin() - second["t"].asin()  # at most a 50th of a right angle
    torch.testing.assert_close(one_step.max().item(), math.pi / 100, rtol=1e-3, atol=0)
    assert (one_step >= 0).all()
    scaled = [call["x_t"] - model.mix(2 * x - 1, 0, call["t"]) for call in (first, second)]
    noises = [noise / noise.std((1, 2, 3), keepdim=True) for noise in scaled]
    assert (noises[0] - noises[1]).abs().amax((1, 2, 3)).median() > 0.1
    x0, _ = model.split(first["x_t"], first["result"], first["t"])
    assert torch.equal(second["x0_last"], x0)
    assert not second["x0_last"].requires_grad


def test_diffusion_hides_one_label_in_ten_in_training():
    model = small_diffusion(n_classes=10)
    y = torch.arange(2000) % 10
    calls = watch(model, "forward")
    model.loss(torch.rand(2000, 1, 8, 8), y)
    hidden = calls[-1]["y"] == 10
    assert 0.08 < hidden.float().mean() < 0.12
    assert torch.equal(calls[-1]["y"][~hidden], y[~hidden])
    model.eval().loss(torch.rand(2000, 1, 8, 8), y)
    assert torch.equal(calls[-1]["y"], y)


def test_diffusion_times_fall_from_1_to_0_and_are_closest_near_1():
    times = tiny("diffusion", size=8).times(50)
    assert (times[0], times[-1], len(times)) == (1, 0, 51)
    gaps = -times.diff()
    assert gaps[0] > 0
    assert (gaps.diff() > 0).all()


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.0), (-0.4, 0.5), (0.3, 2.0)])
def test_diffusion_sampler_turns_noise_into_the_data(mean, std, float64):
    """It should take noise z to mean + std z. Twice as many steps make half the error."""
    model = small_diffusion()
    model.forward = best_v(mean, std)
    z = torch.linspace(-3, 3, 61).view(-1, 1, 1, 1)
    coarse = model.move(z, model.times(50), reversible=True) - (mean + std * z)
    fine = model.move(z, model.times(100), reversible=True) - (mean + std * z)
    assert coarse.abs().max() < 0.2
    assert fine.abs().max() < 0.52 * coarse.abs().max() + 1e-9


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.4, 0.5), (0.3, 2.0)])
def test_diffusion_sampler_turns_data_into_noise(mean, std, float64):
    model = small_diffusion()
    model.forward = best_v(mean, std)
    z = torch.linspace(-3, 3, 61).view(-1, 1, 1, 1)
    coarse = model.move(mean + std * z, torch.linspace(0, 1, 51), reversible=True) - z
    fine = model.move(mean + std * z, torch.linspace(0, 1, 101), reversible=True) - z
    assert coarse.abs().max() < 0.2
    assert fine.abs().max() < 0.52 * coarse.abs().max()


@pytest.mark.parametrize("reversible", [True, False])
def test_diffusion_is_shown_its_last_prediction_in_sampling(reversible):
    model = small_diffusion()
    calls = watch(model, "forward")
    model.move(torch.randn(2, 1, 8, 8), model.times(4), reversible=reversible)
    assert calls[0]["x0_last"] is None
    for before, after in zip(calls, calls[1:]):
        if reversible:
            assert after["x0_last"] is None
        else:
            x0, _ = model.split(before["x_t"], before["result"], before["t"])
            assert torch.equal(after["x0_last"], x0)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.0), (-0.4, 0.5)])
def test_diffusion_samples_are_distributed_like_the_data(mean, std, float64):
    """Few steps make the spread too small. Twice as many steps make half the error."""
    model = small_diffusion()
    model.forward = best_v(mean, std)
    coarse = model.move(torch.randn(3000, 1, 4, 4), model.times(50))
    fine = model.move(torch.randn(3000, 1, 4, 4), model.times(100))
    assert abs(fine.mean() - mean) < 0.02
    assert abs(coarse.std() - std) < 0.1 * std + 1e-9
    assert abs(fine.std() - std) < 0.06 * std + 1e-9


@pytest.mark.parametrize("t, t_next", [(0.3, 0.5), (0.5, 0.3), (0.9, 1.0), (1.0, 0.9), (0.1, 0.0)])
def test_diffusion_renews_what_lies_between_two_times(t, t_next):
    """The later x is a multiple of the earlier one plus noise that does not depend on it."""
    model = small_diffusion()
    eps = torch.randn(50_000, 1, 1, 1)
    renewed = model.renew(eps, torch.full((50_000,), t), torch.full((50_000,), t_next))
    assert abs(renewed.std() - 1) < 0.02
    early, late = sorted([t * math.pi / 2, t_next * math.pi / 2])
    noise_early, noise_late = (eps, renewed) if t < t_next else (renewed, eps)
    factor = math.cos(late) / math.cos(early)
    added = math.sin(late) * noise_late - factor * math.sin(early) * noise_early
    assert abs((added * noise_early).mean()) < 0.02


def test_diffusion_guidance_weighs_what_a_label_adds():
    model = small_diffusion(n_classes=10)
    x = torch.randn(3, 1, 8, 8)
    times = torch.tensor([1.0, 0.0])
    y = torch.tensor([3, 1, 4])
    none = model.move(x, times, torch.full((3,), 10))
    zero, one, three = (model.move(x, times, y, guidance=weight) for weight in (0, 1, 3))
    torch.testing.assert_close(zero, none)
    torch.testing.assert_close(one, model.split(x, model(x, torch.ones(3), y), torch.ones(3))[0])
    torch.testing.assert_close(three, none + 3 * (one - none), rtol=1e-4, atol=1e-4)
    assert (one - none).abs().max() > 1e-3


def test_diffusion_sample_hands_guidance_on():
    model = small_diffusion(n_classes=10)
    images = []
    for weight, label in (0, 3), (0, 7), (1, 3), (1, 7):
        torch.manual_seed(1)
        images.append(model.sample(2, torch.full((2,), label), steps=2, guidance=weight))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[2], images[3])


def test_diffusion_frames_show_noise_becoming_the_image():
    process = small_diffusion().pictures(torch.rand(4, 1, 8, 8))["process"]
    assert process.shape == (25, 4, 1, 8, 16)
    x, x0 = process.chunk(2, dim=4)
    assert len(x.flatten(1).unique(dim=0)) == 25  # no frame is a view of another
    assert torch.equal(x[-1], x0[-1])


def test_diffusion_arcs_keep_the_norm_of_noise():
    a, b = F.normalize(torch.randn(2, 5, 1, 8, 8), dim=(3, 4))
    arcs = diffusion.slerp(a, b, 7)  # (5, 7, 1, 8, 8)
    torch.testing.assert_close(arcs.norm(dim=(3, 4)), torch.ones(5, 7, 1))
    torch.testing.assert_close(arcs[:, 0], a)
    torch.testing.assert_close(arcs[:, -1], b)
    torch.testing.assert_close(diffusion.slerp(a, a, 3)[:, 1], a)  # no 0 / 0


# ---------------------------------------------------------------- the same text
METHODS = dict.fromkeys(["loss", "sample", "pictures"], AUTOREGRESSIVE) | {
    "check_labels": SCRIPTS,
    "tokens": ["rnn", "transformer"],
}
WITH_MUON = [name for name in SCRIPTS if name not in ("made", "gan")]
BLOCKS = dict.fromkeys(["Muon", "orthogonalise"], WITH_MUON) | {
    "train_step": [name for name in SCRIPTS if name != "gan"],
    "Block": ["transformer", "vqvae"],
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_the_same_name_are_the_same_text(method):
    texts = {inspect.getsource(getattr(model_class(name), method)) for name in METHODS[method]}
    assert len(texts) == 1


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_the_same_name_are_the_same_text(block):
    modules = [importlib.import_module(name) for name in BLOCKS[block]]
    assert len({inspect.getsource(getattr(module, block)) for module in modules}) == 1
